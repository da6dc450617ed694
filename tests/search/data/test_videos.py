# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Frames of videos are those that vLLM takes."""

import base64
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from transformers import Glm4vVideoProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor

from vllm_vtw.search.data.sample import BadSampleError, Sample, Video
from vllm_vtw.search.data.videos import Frames, Sampler, as_processor, evenly

SIDE, RATE = 48, 10


def frames(count: int, side: int = SIDE) -> list[Image.Image]:
    """Frames of one color each."""
    return [Image.new("RGB", (side, side), (5 * number, 250 - 5 * number, 100)) for number in range(count)]


def film(folder: Path, count: int, rate: int = RATE) -> str:
    writer = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), rate, (SIDE, SIDE))
    for frame in frames(count):
        writer.write(np.asarray(frame)[..., ::-1])
    writer.release()
    return "film.avi"


def loaded(video: Video, folder: Path, sampler: Sampler = evenly) -> Frames:
    found = Sample("line 1", (), "What?", video=video, folder=folder).load_video(sampler)
    assert found is not None
    return found


def in_vllm(**options: Any) -> VideoMediaIO:
    return VideoMediaIO(ImageMediaIO(), **options)


PROCESSORS = [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, Glm4vVideoProcessor]


@pytest.mark.parametrize("count", [12, 32, 50])
@pytest.mark.parametrize("processor", [None, *PROCESSORS])
def test_a_file(tmp_path, processor, count):
    name, options = film(tmp_path, count), {}
    if processor:
        options["video_backend"] = get_video_loader_backend_for_processor(processor.__name__)
        assert options["video_backend"]
    # What a checkpoint says of these does not count in vLLM.
    sampler = as_processor(processor(min_frames=6, max_frames=8, max_duration=2)) if processor else evenly
    found = loaded(name, tmp_path, sampler)
    wanted, metadata = in_vllm(**options).load_file(tmp_path / name).media
    assert processor or len(wanted) == min(count, 32)
    np.testing.assert_array_equal(found.pixels, wanted)
    assert list(found.metadata.frames_indices) == list(metadata["frames_indices"])
    assert (found.metadata.fps, found.metadata.duration) == (metadata["fps"], metadata["duration"])


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_video_of_one_frame_is_too_short(tmp_path, processor):
    with pytest.raises(BadSampleError, match="it is too short: the model takes at least two frames"):
        loaded(film(tmp_path, 1), tmp_path, as_processor(processor()))


@pytest.mark.parametrize("count", [1, 40])
def test_a_list_of_frames(tmp_path, count):
    names, sent = [], []
    for number, frame in enumerate(frames(count)):
        buffer = io.BytesIO()
        frame.save(buffer, "JPEG")
        names.append(f"{number}.jpg")
        (tmp_path / names[-1]).write_bytes(buffer.getvalue())
        sent.append(base64.b64encode(buffer.getvalue()).decode())
    found = loaded(tuple(names), tmp_path)
    wanted, metadata = in_vllm().load_base64("video/jpeg", ",".join(sent)).media
    np.testing.assert_array_equal(found.pixels, wanted)
    assert found.metadata.frames_indices == metadata["frames_indices"]
    assert (found.metadata.fps, found.metadata.duration) == (metadata["fps"], metadata["duration"])


@pytest.mark.parametrize(
    ("video", "said"),
    [
        ("none.mp4", "^video 'none.mp4': there is no such file"),
        ("text.mp4", "^video 'text.mp4': cannot be read"),
        ("0.png", "^video '0.png': cannot be read"),
        ("http://a/b.mp4", "only paths are read; give one, or a list of the frames"),
        ("data:video/mp4;base64," + "A" * 5000, "^video 'data:video/mp4;base64,A+': only paths are read"),
        (("0.png", "none.png"), "^image 'none.png': there is no such file"),
        (("0.png", "1.png"), "^video of '0.png': the frames have different sizes"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, video, said):
    (tmp_path / "text.mp4").write_text("no video")
    frames(1)[0].save(tmp_path / "0.png")
    frames(1, 2 * SIDE)[0].save(tmp_path / "1.png")
    with pytest.raises(BadSampleError, match=said):
        loaded(video, tmp_path)
