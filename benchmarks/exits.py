# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads from the plugin's debug logs at which layer the visual tokens of requests left."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

EXIT = re.compile(r"vtw: request (\S+): its visual tokens leave at layer (\d+)")


@contextmanager
def logged_exits() -> Iterator[dict[str, int]]:
    """By request of engines that run in this process: the layer; the number of layers where they stayed."""
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
    """By the number that a request was given; vLLM adds to it."""
    return {int(request.split("-")[0]): layer for request, layer in found.items()}
