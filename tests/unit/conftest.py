"""What the plugin logs, whether or not an engine of an earlier test has configured vLLM's logging."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def logged(caplog, monkeypatch) -> Iterator[list[logging.LogRecord]]:
    """The plugin's records from INFO on."""
    logger = logging.getLogger("vllm.vtw")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level("INFO", logger.name):
        yield caplog.records
    logger.removeHandler(caplog.handler)
