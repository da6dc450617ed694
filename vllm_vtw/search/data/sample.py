"""A sample of a user's data, and what is said of those that cannot be used."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_vtw.search.data.pictures import BadPictureError, load_picture

Message = dict[str, Any]
PLACES = 3


class BadSampleError(ValueError):
    """A sample cannot be used; the message says why.

    Args:
        why: The message.
        kind: What messages that differ in a name or a number have in common; the message by default.
    """

    def __init__(self, why: str, kind: str | None = None) -> None:
        super().__init__(why)
        self.kind = kind or why


@dataclass(frozen=True)
class Sample:
    """One request, its pictures not read yet.

    Attributes:
        where: The line, the item or the file that it comes from.
        images: Paths or data URLs, in the order of the prompt.
        prompt: The text as the model gets it, with its image placeholders; None where there are messages.
        messages: A chat, each content a list of parts of type "text" and "image".
        task: What accuracy is looked at by.
        answer: What the model should say, where that is known.
    """

    where: str
    images: tuple[str, ...]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    task: str = "all"
    answer: str | None = None
    folder: Path = field(default=Path(), compare=False)

    def pictures(self) -> list[Image.Image]:
        """The pictures in RGB.

        Raises:
            BadSampleError: One cannot be read.
        """
        try:
            return [load_picture(source, self.folder) for source in self.images]
        except BadPictureError as error:
            raise BadSampleError(str(error), error.kind) from error


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used.

    Attributes:
        where: The line, the item or the file that it comes from.
        error: Why.
    """

    where: str
    error: BadSampleError


def skip_messages(skipped: Iterable[Skipped]) -> list[str]:
    """Why samples are skipped, in one line for each kind of reason."""
    by_kind: dict[str, list[Skipped]] = defaultdict(list)
    for one in skipped:
        by_kind[one.error.kind].append(one)
    return [_line(some) for some in by_kind.values()]


def _line(some: Sequence[Skipped]) -> str:
    first, reasons = some[0], {str(one.error) for one in some}
    if len(some) == 1:
        return f"{first.where}: {first.error}"
    unit = first.where.partition(" ")[0]
    places = ", ".join(one.where.partition(" ")[2] for one in some[:PLACES])
    more = f" and {len(some) - PLACES} more" if len(some) > PLACES else ""
    return f"{unit}s {places}{more}: {'the first: ' if len(reasons) > 1 else ''}{first.error}"
