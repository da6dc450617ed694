# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The pages build without a warning, and lead to files and commands that exist."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from argparse import ArgumentParser

import pytest

from tests.deploy.options import parsed
from tests.docs.pages import PAGES, README, REPOSITORY, ROOT, blocks, commands, links
from tools.messages_table import SECTIONS, messages
from tools.messages_table import page as messages_page
from vllm_vtw import __version__
from vllm_vtw.commands import calibrate, doctor, dyvte, guard, plan, schedules
from vllm_vtw.policy import Policy
from vllm_vtw.versions import TESTED

ALL = pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)


def test_the_site_is_built_without_a_warning(tmp_path):
    """`strict` in mkdocs.yml makes a warning an error. A link that leads nowhere is one."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    index = json.loads((tmp_path / "site/search/search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"]}
    assert {f"{page.stem}/" for page in PAGES if page.stem != "index"} <= found
    assert "api/#vllm_vtw.policy.Policy" in found
    assert (
        '<img alt="right answers by task over K"'
        in (tmp_path / "site/choosing-a-layer/index.html").read_text()
    )


@ALL
def test_links_into_the_repository_lead_to_files(page):
    for link in links(page):
        path, _, anchor = link.removeprefix(REPOSITORY).partition("#")
        if path.startswith("http") or not path:
            continue
        target = ROOT / path if link.startswith(REPOSITORY) else page.parent / path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings], (
                link
            )


def parser_of_vtw() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    subparsers = parser.add_subparsers(required=True)
    for command in (plan, calibrate, schedules, dyvte, guard, doctor):
        command.add_command(subparsers)
    return parser


@ALL
def test_commands_are_ones_that_programs_understand(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(page):
        match words:
            case ["vtw", "--version"]:
                pass
            case ["vtw", *arguments]:
                parser_of_vtw().parse_args(arguments)
            case ["vllm", "serve", *_]:
                parsed(*words[1:])
            case ["make", *named]:
                assert set(named) <= {*targets}, words
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), words


@ALL
def test_inline_commands_exist(page):
    """Commands that a sentence names, such as `python -m benchmarks.plan_cost` and `make bench`."""
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for module in re.findall(r"python -m ((?:benchmarks|tools|vllm_vtw)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets


@ALL
def test_policy_files_can_be_read(page):
    """A block that begins with `"stages"` shows the rest of a policy file."""
    model = {"model_type": "llava", "num_hidden_layers": 32, "hidden_size": 4096}
    for language, text in blocks(page):
        if language == "json":
            data = json.loads(text if text.startswith("{") else f"{{{text}}}")
            whole = {"format": "vllm-vtw-policy/1", "model": model, "ranking": None, "gate": None}
            Policy.from_json(whole | data, model)
        elif language == "python":
            compile(text, page.name, "exec")


def test_messages_are_those_of_the_source():
    assert (ROOT / "docs/messages.md").read_text(encoding="utf-8") == messages_page()


def test_every_module_of_a_server_that_has_messages_is_on_their_page():
    listed = {f"vllm_vtw.{name}" for names in SECTIONS.values() for name in names}
    for file in sorted((ROOT / "vllm_vtw").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not module.startswith(("vllm_vtw.commands", "vllm_vtw.search")) and module not in listed:
            assert list(messages(importlib.import_module(module))) == [], module


@ALL
def test_paths_of_the_repository_exist(page):
    """Those in backticks that begin with a folder of the repository."""
    folders = "benchmarks|deploy|docs|patches|tests|tools|vllm_vtw"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_deployment_has_the_commands_of_the_files():
    files = "".join(file.read_text() for file in (ROOT / "deploy").iterdir() if file.is_file())
    in_comments = " ".join(re.sub(r"^#", "", files, flags=re.M).split())
    shown = [
        text
        for _, text in blocks(ROOT / "docs/deployment.md")
        if text.startswith(("docker", "helm", "python3"))
    ]
    assert len(shown) == 3
    for command in "".join(shown).replace("\\\n", "\\ ").splitlines():
        assert " ".join(command.split()) in in_comments


def test_security_fixes_are_for_the_versions_that_were_tested():
    minor = __version__.rpartition(".")[0]
    row = f"| {minor}.x, on vLLM {' and '.join(one.version for one in TESTED)} | yes |"
    assert row in (ROOT / "SECURITY.md").read_text()


def test_readme_is_short_and_its_tables_are_those_of_the_pages():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    documented = {line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()}
    numbers = [line for line in text.splitlines() if re.match(r"\|[^|]*\| [\d.]+[ ,]", line)]
    assert len(numbers) >= 10
    assert set(numbers) <= documented
