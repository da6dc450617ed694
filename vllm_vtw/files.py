"""Reads files that come from somebody else, and shows what is in them, without trusting either."""

import os
import reprlib
import stat
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def read_file(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    Args:
        path: The file.
        most_bytes: So long it may be.

    Raises:
        ValueError: There is no such file, it cannot be read, is too long, or is a folder, pipe or device.
    """
    try:
        # A pipe that nobody writes to would be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no regular file")
            content = b"" if found.st_size > most_bytes else file.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if max(found.st_size, len(content)) > most_bytes:
        raise ValueError(f"it has {found.st_size} bytes, and may have {most_bytes}")
    return content


def short(value: Any) -> str:
    """A value as it is shown in a message: one line, cut where it is long."""
    return _SHORT.repr(value)
