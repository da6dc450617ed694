# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A fixture that records what the plugin logs, also after an engine has configured vLLM's logging."""

import logging
from collections.abc import Iterator

import pytest


class RecordingHandler(logging.Handler):
    """Keeps the log records that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged(monkeypatch) -> Iterator[list[logging.LogRecord]]:
    """The records that the plugin logs in the test, of level INFO or higher."""
    handler, logger = RecordingHandler(), logging.getLogger("vllm.vtw")
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.setLevel(level)
