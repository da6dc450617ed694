# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads files that users got from elsewhere, and shows values in messages, whatever they contain."""

import os
import reprlib
import stat
from pathlib import Path
from typing import Any

MAX_SHOWN = 200
"""The largest number of characters that `shorten` returns."""
_OUTLINE = reprlib.Repr()
_OUTLINE.maxlevel = 2
_OUTLINE.maxstring = _OUTLINE.maxother = MAX_SHOWN


def read_file(path: Path, most_bytes: int) -> bytes:
    """Reads a regular file. Symbolic links are followed.

    Args:
        path: Path of the file.
        most_bytes: The largest size that is allowed. A larger file is refused before any of it is read.

    Raises:
        ValueError: The file does not exist, cannot be read, is too large, or is a folder, pipe or device.
    """
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is not a regular file")
            if found.st_size > most_bytes:
                raise ValueError(f"it has {found.st_size} bytes, more than the {most_bytes} that are allowed")
            return file.read(found.st_size)
    except OSError as error:
        raise ValueError(error.strerror or shorten(error)) from error


def shorten(value: Any) -> str:
    """A value as messages show it: one line of at most `MAX_SHOWN` characters. Its middle may be left out."""
    try:
        shown = _OUTLINE.repr(value)
    except ValueError:  # Python does not convert integers of more than 4,300 digits to text.
        shown = f"<{type(value).__name__} with more digits than can be shown>"
    if len(shown) <= MAX_SHOWN:
        return shown
    end = (MAX_SHOWN - 3) // 2
    return f"{shown[:end]}...{shown[-end:]}"
