# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Runs `vllm serve` for a benchmark or test, and leaves no process behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT = 600.0
"""How long a server may take to start, in seconds."""
STOP_TIMEOUT = 10.0
"""How long a server may take to end after a signal, in seconds, before it gets the next signal."""


class ServerError(Exception):
    """A server did not start, or failed later. The message contains what `Server.complaint` returns."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: The server's base URL, such as `http://127.0.0.1:8000`.
        command: The `vllm serve` command line that stands for how the server was started.
        log_file: The file with the server's log.
        process: The server's main process.
    """

    url: str
    command: list[str]
    log_file: Path
    process: subprocess.Popen

    def log(self) -> str:
        """The log so far."""
        return self.log_file.read_text(errors="replace")

    def complaint(self) -> str:
        """Up to 6000 characters of the log: from its first error on, or its end if it has no error."""
        before, error, after = self.log().partition("ERROR")
        return (error + after)[:6000] or before[-6000:]

    def metrics(self) -> dict[str, float]:
        """The values of Prometheus metrics by name, each summed over its labels."""
        totals: dict[str, float] = {}
        for line in self.metrics_page().splitlines():
            if sample := re.fullmatch(r"([a-z_:]+)(?:\{.*\})? (\S+)", line):
                totals[sample[1]] = totals.get(sample[1], 0.0) + float(sample[2])
        return totals

    def by_engine(self, metric: str) -> dict[str, float]:
        """The values of a metric by data-parallel engine, each summed over the other labels."""
        totals: dict[str, float] = {}
        for line in self.metrics_page().splitlines():
            if sample := re.fullmatch(re.escape(metric) + r'\{.*engine="(\d+)".*\} (\S+)', line):
                totals[sample[1]] = totals.get(sample[1], 0.0) + float(sample[2])
        return totals

    def metrics_page(self) -> str:
        """The content of `/metrics`."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            return response.read().decode()


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that the kernel gives to nothing but the server that it is meant for.

    A server binds its port seconds after it is started. Until the `with` block ends, a socket that does not
    listen is bound to the port: the kernel gives it to nobody who asks for a free port, but lets a server
    bind it that sets `SO_REUSEADDR`, as servers do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def serving(model: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Runs `vllm serve MODEL OPTIONS` on a free port until the `with` block ends or raises.

    Args:
        model: The folder of the checkpoint.
        options: Options of `vllm serve`.
        env: Environment variables for the server, in addition to this process's.

    Yields:
        The server, which answers requests.

    Raises:
        ServerError: The server did not start.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    with reserved_port() as port, tempfile.TemporaryDirectory() as folder:
        shown = ["vllm", "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
        # If vLLM is on Python's path but not installed, the module exists but the `vllm` command does not.
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *shown[1:]]
        log_file = Path(folder) / "server.log"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The server gets a process group of its own, which `_end` ends as a whole. Ctrl-C then
                # reaches only this process.
                start_new_session=True,
                env=os.environ | settings | (env or {}),
            )
        server = Server(f"http://127.0.0.1:{port}", shown, log_file, process)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            _end(process)


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            status = server.process.returncode
            raise ServerError(f"vllm serve ended with status {status}:\n{server.complaint()}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise ServerError(f"vllm serve did not answer within {START_TIMEOUT:.0f} s:\n{server.complaint()}")


def _end(process: subprocess.Popen) -> None:
    """Ends the server's process group. SIGINT is sent first, so that the server removes its shared memory."""
    print("  stopping the server", flush=True)
    # A second Ctrl-C is ignored, as it would leave processes behind.
    impatient = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            deadline = time.monotonic() + STOP_TIMEOUT
            while time.monotonic() < deadline:
                if process.poll() is not None and not alive(process.pid):
                    return
                time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, impatient)


def alive(group: int) -> list[psutil.Process]:
    """The processes of a process group, without zombies.

    Args:
        group: The id of the process group.
    """
    members = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                members.append(process)
    return members
