"""Reads files that come from somebody else, and shows what is in them, without trusting either."""

import os
import reprlib
import stat
from pathlib import Path
from typing import Any

MAX_SHOWN = 200
_OUTLINE = reprlib.Repr()
_OUTLINE.maxlevel = 2
_OUTLINE.maxstring = _OUTLINE.maxother = MAX_SHOWN


def read_file(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    Args:
        path: The file.
        most_bytes: A longer file is refused before any of it is read.

    Raises:
        ValueError: There is no such file, it cannot be read, is too long, or is a folder, pipe or device.
    """
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no regular file")
            if found.st_size > most_bytes:
                raise ValueError(f"it has {found.st_size} bytes, and may have {most_bytes}")
            return file.read(found.st_size)
    except OSError as error:
        raise ValueError(error.strerror or shorten(error)) from error


def shorten(value: Any) -> str:
    """A value as a message shows it: in one line, at most `MAX_SHOWN` characters, the middle left out."""
    try:
        shown = _OUTLINE.repr(value)
    except ValueError:  # Python does not write out integers of more than 4,300 digits.
        shown = f"<{type(value).__name__} with more digits than can be shown>"
    if len(shown) <= MAX_SHOWN:
        return shown
    end = (MAX_SHOWN - 3) // 2
    return f"{shown[:end]}...{shown[-end:]}"
