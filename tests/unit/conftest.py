"""What the plugin logs, whether or not an engine of an earlier test has configured vLLM's logging."""

import logging
from collections.abc import Iterator

import pytest


class Kept(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged(monkeypatch) -> Iterator[list[logging.LogRecord]]:
    """The plugin's records from INFO on."""
    kept, logger = Kept(), logging.getLogger("vllm.vtw")
    monkeypatch.setattr(logger, "handlers", [kept])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield kept.records
    logger.setLevel(level)
