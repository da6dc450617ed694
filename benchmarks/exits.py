# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads from the plugin's debug log at which layer the visual tokens of each request left."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

EXIT = re.compile(r"vtw: request (\S+): its visual tokens leave at layer (\d+)")


@contextmanager
def logged_exits() -> Iterator[dict[str, int]]:
    """Collects the exits that engines in this process log, until the `with` block ends.

    Yields:
        The layer at which visual tokens left, by vLLM's request id. It is L if they stayed.
    """
    found: dict[str, int] = {}

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told = EXIT.fullmatch(record.getMessage())
            if told:
                assert told[1] not in found, "decided twice"
                found[told[1]] = int(told[2])

    logger, reader = logging.getLogger("vllm.vtw"), Reader()
    level = logger.level
    logger.addHandler(reader)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(reader)
        logger.setLevel(level)


def by_number(found: dict[str, int]) -> dict[int, int]:
    """The exits by request number.

    A request's id begins with its number, and vLLM appends a suffix: `"12-ab34"` is request 12.

    Args:
        found: The exits by request id, as `logged_exits` yields them.
    """
    return {int(request.split("-")[0]): layer for request, layer in found.items()}
