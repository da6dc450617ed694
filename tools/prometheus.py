# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Runs a Prometheus server, of which Debian's package `prometheus` has the program, and asks it."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.server import reserved_port

START_TIMEOUT = 30.0
"""How long Prometheus may take until it has read a server's metrics, in seconds."""


class PrometheusError(Exception):
    """Prometheus did not start, or answered with an error."""


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus server.

    Attributes:
        url: Its base URL.
    """

    url: str

    def get(self, path: str, **parameters: str | float) -> Any:
        """The data that a path below `/api/v1/` returns.

        Raises:
            PrometheusError: Prometheus answered with an error, which is the message.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise PrometheusError(error.read().decode()) from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression at this moment, each with its labels and its value."""
        return self.get("query", query=expression)["result"]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of an expression over a time, each with its labels and its values.

        Args:
            expression: The expression.
            start: The first moment, in seconds since the epoch.
            end: The last moment.
            step: The seconds between two values.
        """
        return self.get("query_range", query=expression, start=start, end=end, step=step)["result"]


@contextmanager
def scraping(url: str, rules: Path) -> Iterator[Prometheus]:
    """Runs a Prometheus that reads a server's metrics once a second, until the `with` block ends.

    The block begins when it has read them for the first time.

    Args:
        url: The server's base URL.
        rules: The file with rules, which are evaluated once a second.

    Raises:
        PrometheusError: Prometheus is not installed, did not start, or could not read the metrics.
    """
    if shutil.which("prometheus") is None:
        raise PrometheusError("prometheus is not on the PATH: install Debian's package `prometheus`")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules.resolve())],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc]}]}
        ],
    }
    with reserved_port() as port, TemporaryDirectory() as folder:
        file = Path(folder) / "prometheus.yml"
        file.write_text(json.dumps(config))  # JSON is YAML.
        options = [f"--config.file={file}", f"--storage.tsdb.path={folder}/data", "--log.level=error"]
        with subprocess.Popen(["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"]) as process:
            try:
                prometheus = Prometheus(f"http://127.0.0.1:{port}")
                _wait_for_first_scrape(prometheus, process)
                yield prometheus
            finally:
                process.terminate()


def _wait_for_first_scrape(prometheus: Prometheus, process: subprocess.Popen) -> None:
    """Waits until Prometheus has read the server's metrics, which takes it about five seconds."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PrometheusError(f"prometheus ended with status {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, PrometheusError):
            if prometheus.query("up == 1"):
                return
        time.sleep(0.1)
    raise PrometheusError(f"prometheus has not read the server's metrics within {START_TIMEOUT:.0f} s")
