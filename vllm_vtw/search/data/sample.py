# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A sample of a user's data, and the messages about samples that cannot be used."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_vtw.search.data.images import BadImageError, load_image
from vllm_vtw.search.data.videos import Frames, Sampler, load_video

Message = dict[str, Any]
Video = str | tuple[str, ...]
"""The path of a video, or the paths or data URLs of its frames."""
MAX_SHOWN_PLACES = 3
"""The number of samples that a message names at most."""


class BadSampleError(ValueError):
    """Raised if a sample cannot be used.

    Args:
        why: The message, which says why.
        kind: The reason without details such as names and numbers. `skip_messages` groups samples by it. The
            message by default.
    """

    def __init__(self, why: str, kind: str | None = None) -> None:
        super().__init__(why)
        self.kind = kind or why


@dataclass(frozen=True)
class Sample:
    """One request. Its images or its video are not read yet.

    Attributes:
        where: The place that the sample comes from: "line 3", "item 3" or "file a.png".
        images: Paths or data URLs of the images, in the order of their placeholders in the prompt.
        prompt: The text as the model gets it, with placeholders. None if the sample has `messages`.
        messages: The messages of a chat. Each `content` is a list of parts of type "text" and "image" or
            "video". Empty if the sample has a `prompt`.
        task: The name of the task that the sample belongs to. Results are reported by task.
        labelled: Whether the data names the task.
        answer: The expected answer. None if it is not known.
        video: The video. None if the sample has images.
        folder: The folder that relative paths start from.
    """

    where: str
    images: tuple[str, ...]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    task: str = "all"
    labelled: bool = False
    answer: str | None = None
    video: Video | None = None
    folder: Path = field(default=Path(), compare=False)

    def load_images(self) -> list[Image.Image]:
        """Reads the images, in RGB.

        Raises:
            BadSampleError: An image cannot be read.
        """
        try:
            return [load_image(source, self.folder) for source in self.images]
        except BadImageError as error:
            raise BadSampleError(str(error), error.kind) from error

    def load_video(self, sampler: Sampler) -> Frames | None:
        """Reads the video. None if the sample has none.

        Args:
            sampler: Chooses frames of a file.

        Raises:
            BadSampleError: The video or a frame cannot be read.
        """
        try:
            return None if self.video is None else load_video(self.video, self.folder, sampler)
        except BadImageError as error:
            raise BadSampleError(str(error), error.kind) from error


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used.

    Attributes:
        where: The place that the sample comes from, as in `Sample.where`.
        error: The reason.
    """

    where: str
    error: BadSampleError


def skip_messages(skipped: Iterable[Skipped]) -> list[str]:
    """Says why samples are skipped, in one line for each kind of reason."""
    by_kind: dict[str, list[Skipped]] = defaultdict(list)
    for one in skipped:
        by_kind[one.error.kind].append(one)
    return [_skip_message(same_kind) for same_kind in by_kind.values()]


def _skip_message(same_kind: Sequence[Skipped]) -> str:
    same_kind = sorted(same_kind, key=lambda one: [int(part) for part in re.findall(r"\d+", one.where)])
    first, reasons = same_kind[0], {str(one.error) for one in same_kind}
    if len(same_kind) == 1:
        return f"{first.where}: {first.error}"
    unit = first.where.partition(" ")[0]
    places = ", ".join(one.where.partition(" ")[2] for one in same_kind[:MAX_SHOWN_PLACES])
    more = f" and {len(same_kind) - MAX_SHOWN_PLACES} more" if len(same_kind) > MAX_SHOWN_PLACES else ""
    return f"{unit}s {places}{more}: {'the first: ' if len(reasons) > 1 else ''}{first.error}"
