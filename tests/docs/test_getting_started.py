# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The commands of `docs/getting-started.md` print what the page says."""

import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.server import Server, serving
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/getting-started.md"
URL = "http://127.0.0.1:8000"
"""Where the page's server is. The test's is on a free port."""
GUARD_QUIET = 2.0
"""For how long the guard reads nothing more until it is done, in seconds."""
NUMBER = re.compile(r"\d[\d.]*(e-\d+)?")


def missing_lines(shown: str, printed: str) -> list[str]:
    """The lines of a block that were not printed, or not in this order. `...` stands for anything."""
    left, missing = " ".join(printed.split()), []
    for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
        found = re.search(".*?".join(map(re.escape, line.split("..."))), left)
        if found is None:
            missing.append(line)
        else:
            left = left[found.end() :]
    return missing


def test_missing_lines():
    assert missing_lines("a  1\n\nb ... c", "x a 1 b 2 c") == []
    assert missing_lines("b\na", "a b") == ["a"]
    assert missing_lines("a.c", "abc") == ["a.c"]


def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    """From `vtw doctor` to `vtw guard`, in a folder from which the repository looks as from its own."""
    monkeypatch.chdir(tmp_path)
    Path("benchmarks").symlink_to(ROOT / "benchmarks")
    printed, compared = "", 0
    server: Server | None = None
    with ExitStack() as ends:
        for language, text in blocks(PAGE):
            if not language and "MODEL" in text:
                break  # the reader's own model
            if language == "text":
                by_lot = "read again" in text
                seen = [NUMBER.sub("N", one) if by_lot else one for one in (text, printed)]
                assert missing_lines(*seen) == []
                compared += 1
            elif text.startswith("vllm serve"):
                model, *options = shlex.split(text.replace("\\\n", " "))[2:]
                server = ends.enter_context(serving(Path(model), *options))
                printed = server.log()
            elif "git clone" not in text:
                if "vtw guard" in text:
                    wait_for_guard(server)
                command = [sys.executable, "-c", text] if language == "python" else ["bash", "-c", text]
                printed += run([word.replace(URL, server.url if server else URL) for word in command])
    assert compared == 8


def run(command: list[str]) -> str:
    """What a command prints. `python` and `vtw` are those of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_guard(server: Server | None) -> None:
    """Waits until the guard has read all answers that it took."""
    assert server is not None
    before, read = -1.0, 0.0
    while before < read:
        time.sleep(GUARD_QUIET)
        before, read = read, server.metrics().get("vllm:vtw_guard_requests_total", 0)
