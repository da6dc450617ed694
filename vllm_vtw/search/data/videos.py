# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Loads videos in the way in which `vllm serve` does by default before it gives them to a model."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_vtw.search.data.images import BadImageError, load_image

MAX_FRAMES = 32
"""The most frames that are taken of a video, as in vLLM (`num_frames` in `--media-io-kwargs`)."""
FRAMES_PER_SECOND = 1.0
"""The rate of a video that is given as a list of frames, as in vLLM."""
SAMPLED_PER_SECOND = 2
"""The rate at which vLLM samples a video for a model whose processor has a rule of its own."""
LIMITS = {"min_frames": 4, "max_frames": 768, "max_duration": 300, "temporal_patch_size": 2}
"""What vLLM's loaders have in place of a processor's own limits, whatever the checkpoint says."""

Sampler = Callable[[Any], npt.NDArray[np.int_]]
"""Chooses frames of a video: returns their numbers, ascending, given its metadata."""


class Frames(NamedTuple):
    """The frames of a video.

    Attributes:
        pixels: The frames in RGB, shape `(frames, height, width, 3)`, uint8.
        metadata: What transformers' processors are told about the video.
    """

    pixels: npt.NDArray[np.uint8]
    metadata: Any


def evenly(metadata: Any) -> npt.NDArray[np.int_]:
    """Chooses up to `MAX_FRAMES` frames, spread evenly over a video's whole length."""
    total = metadata.total_num_frames
    return np.linspace(0, total - 1, min(MAX_FRAMES, total), dtype=int)


def as_processor(video_processor: Any) -> Sampler:
    """Chooses frames by the rule of a video processor, as vLLM does for Qwen-VL and GLM-V.

    Args:
        video_processor: The checkpoint's video processor, of transformers.
    """
    limited = copy(video_processor)
    for name, limit in LIMITS.items():
        if getattr(limited, name, None) is not None:
            setattr(limited, name, limit)

    def sample(metadata: Any) -> npt.NDArray[np.int_]:
        try:
            frames = limited.sample_frames(metadata, fps=SAMPLED_PER_SECOND)
        except ZeroDivisionError:
            frames = []
        # Rounding may lead behind the last frame.
        found = np.unique(np.asarray(frames, dtype=int).clip(max=metadata.total_num_frames - 1))
        if len(found) < LIMITS["temporal_patch_size"]:
            raise ValueError("it is too short: the model takes at least two frames")
        return found

    return sample


def load_video(source: str | tuple[str, ...], folder: Path, sampler: Sampler) -> Frames:
    """Loads frames of a video: of a file those that a rule chooses, of a list the first `MAX_FRAMES`.

    Args:
        source: The path of a video, or the paths or data URLs of its frames.
        folder: The folder that relative paths start from.
        sampler: The rule.

    Raises:
        BadImageError: The video or a frame cannot be read.
        ImportError: OpenCV, which reads video files, is not installed.
    """
    from transformers.video_utils import VideoMetadata
    from transformers.video_utils import load_video as load_file

    def sample(metadata: Any, **_: Any) -> npt.NDArray[np.int_]:
        if metadata.total_num_frames <= 0:
            raise ValueError("it has no frames")
        return sampler(metadata)

    if isinstance(source, str):
        name = f"video {source!r}"
        if "://" in source or source.startswith("data:"):
            name = f"video {source[:40]!r}"
            raise BadImageError(name, "only paths are read; give one, or a list of the frames")
        path = folder / source
        try:
            is_file = path.is_file()
        except OSError:  # The name is too long, for example.
            is_file = False
        if not is_file:
            raise BadImageError(name, "there is no such file", str(path))
        try:
            pixels, metadata = load_file(str(path), backend="opencv", sample_indices_fn=sample)
        except ImportError:
            raise
        except Exception as error:  # OpenCV and transformers let through errors of many types
            raise BadImageError(name, "cannot be read", str(error)) from error
        return Frames(pixels, metadata)
    images = [np.asarray(load_image(frame, folder)) for frame in source[:MAX_FRAMES]]
    if len({image.shape for image in images}) > 1:
        raise BadImageError(f"video of {source[0]!r}", "the frames have different sizes")
    count = len(images)
    return Frames(
        np.stack(images),
        VideoMetadata(
            total_num_frames=count,
            fps=FRAMES_PER_SECOND,
            duration=count / FRAMES_PER_SECOND,
            frames_indices=list(range(count)),
            video_backend="jpeg_sequence",
        ),
    )
