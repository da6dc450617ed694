"""Files of samples: JSON lines, or one JSON list."""

import io
import json
from typing import Any

from vllm_vtw.search.data.sample import BadSampleError

TAKEN = "--data takes JSON lines, a JSON list of objects, or a folder of pictures"


def read_entries(content: bytes) -> list[tuple[str, Any]]:
    """What a file holds: each value with its place, and a `BadSampleError` for a line that is not JSON.

    Raises:
        ValueError: The file holds no JSON object in one of these formats.
    """
    try:
        text = content.decode(json.detect_encoding(content), "surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"this is no JSON: {TAKEN}") from error
    if text.lstrip().startswith("["):
        try:
            found = [(f"item {number}", _checked(value)) for number, value in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"this begins as a JSON list and is none: {error}") from error
    else:
        # `str.splitlines` would end a line at characters that a JSON string may have.
        lines = enumerate(io.StringIO(text, newline=None), 1)
        found = [(f"line {number}", _value(line.strip())) for number, line in lines if line.strip()]
    if found and not any(isinstance(value, dict) for _, value in found):
        where, value = found[0]
        why = value if isinstance(value, BadSampleError) else "not a JSON object"
        raise ValueError(f"{where}: {why}; {TAKEN}")
    return found


def _value(line: str) -> Any:
    try:
        return _checked(json.loads(line))
    except json.JSONDecodeError as error:
        return BadSampleError(f"not JSON: {error.msg} at column {error.colno}", "not JSON")
    except (ValueError, RecursionError) as error:  # of a number of too many digits, or of "[[[["
        return BadSampleError(f"not JSON: {error}", "not JSON")


def _checked(value: Any) -> Any:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, or bytes that are not UTF-8, are no text
        return BadSampleError(f"not JSON: {error}", "not JSON")
    return value
