# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads the JSON values of a data file: JSON lines, or one JSON list."""

import io
import json
from typing import Any

from vllm_vtw.search.data.sample import BadSampleError

ACCEPTED_DATA = "--data takes JSON lines, a JSON list of objects, or a folder of images"


def read_entries(content: bytes) -> list[tuple[str, Any]]:
    """Reads a file's JSON values.

    Args:
        content: The file's content, in UTF-8, UTF-16 or UTF-32.

    Returns:
        Each value with its place, such as "line 3" or "item 3". In place of a value that is not valid JSON
        there is a `BadSampleError`.

    Raises:
        ValueError: The file is neither JSON lines nor a JSON list, or has values but no JSON object.
    """
    try:
        text = content.decode(json.detect_encoding(content), "surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not JSON: {ACCEPTED_DATA}") from error
    if text.lstrip().startswith("["):
        try:
            found = [(f"item {number}", _checked(value)) for number, value in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the file begins like a JSON list but is not one: {error}") from error
    else:
        # `str.splitlines` would also split at characters that a JSON string may contain, such as U+2028.
        lines = enumerate(io.StringIO(text, newline=None), 1)
        found = [(f"line {number}", _parsed(line.strip())) for number, line in lines if line.strip()]
    if found and not any(isinstance(value, dict) for _, value in found):
        where, value = found[0]
        why = value if isinstance(value, BadSampleError) else "not a JSON object"
        raise ValueError(f"{where}: {why}; {ACCEPTED_DATA}")
    return found


def _parsed(line: str) -> Any:
    """The value of a line, or a `BadSampleError` if it has none."""
    try:
        return _checked(json.loads(line))
    except json.JSONDecodeError as error:
        return BadSampleError(f"not JSON: {error.msg} at column {error.colno}", "not JSON")
    except (ValueError, RecursionError) as error:  # A number has too many digits, or nesting is too deep.
        return BadSampleError(f"not JSON: {error}", "not JSON")


def _checked(value: Any) -> Any:
    """The same value, or a `BadSampleError` if a string in it cannot be encoded in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # It has half a surrogate pair, or bytes that are not UTF-8.
        return BadSampleError(f"not JSON: {error}", "not JSON")
    return value
