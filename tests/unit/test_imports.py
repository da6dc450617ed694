# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of which rooms (folders and top-level files) of the package import which, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_vtw

PACKAGE = Path(vllm_vtw.__file__).parent
HEAVY = {"torch", "transformers", "vllm"}

ALLOWED = {
    "policy": {"untrusted_files"},
    "choice": {"policy", "untrusted_files"},
    "config": {"families", "untrusted_files", "policy"},
    "retention": {"policy", "rankings"},
    "capacity": {"policy"},
    "families": set(),
    "versions": set(),
    "untrusted_files": set(),
    "gates": {"untrusted_files", "policy"},
    "plugin": {"models", "versions"},
    "startup": {"capacity", "config", "families", "gates", "policy"},
    "metrics": {"config", "startup"},
    "rankings": set(),
    "kv": {"capacity", "choice", "config", "metrics", "policy", "retention", "startup", "versions"},
    "worker": {
        "capacity",
        "choice",
        "config",
        "gates",
        "kv.spec",
        "policy",
        "rankings",
        "retention",
        "startup",
        "versions",
    },
    "connectors": {"choice", "kv", "retention", "startup"},
    "models": {
        "choice",
        "config",
        "families",
        "policy",
        "rankings",
        "retention",
        "startup",
        "versions",
        "worker",
    },
    "search": {"capacity", "config", "families", "policy", "rankings"},
    "search.data": {"families", "policy", "search.checkpoint"},
    "search.vtw": {"config", "policy", "search", "search.data"},
    "search.schedules": {"policy", "search", "search.data"},
    "search.dyvte": {"gates", "policy", "search", "search.data"},
    "search.reports": {"search.vtw.criteria"},
    "commands": {"capacity", "config", "families", "gates", "policy", "search", "untrusted_files", "versions"}
    | {"search.data", "search.vtw", "search.schedules", "search.dyvte", "search.reports"},
}
"""For each room, a folder or a file of the package: the rooms and single files that it may import."""

MAY_ALSO = {
    "search.model": {"search.data.prompts", "search.data.sample"},
    "search.resume": {"search.data.prompts", "search.data.sample"},
    "commands.doctor": {"kv.groups", "worker.attention_backend", "worker.runner_v1", "worker.runner_v2"},
    "models.served": {"kv.groups"},
}
"""For single files, what else they may import: the model encodes samples, `vtw doctor` tries the hooks, and
vLLM 0.33 asks model classes for KV-cache groups."""

WITHOUT_HEAVY = (
    "policy",
    "config",
    "families",
    "retention",
    "capacity",
    "untrusted_files",
    "versions",
    "commands",
    "search.checkpoint",
)
"""Rooms and files whose import needs neither vLLM nor torch. `vtw doctor` runs where they are missing."""


def name_of(file: Path) -> str:
    """The name of a module, without the package's name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


TREES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
"""The syntax tree of every module."""


def room(module: str) -> str:
    """The room of a module: the innermost one that contains it. Names are without the package's name."""
    parents = [module.rsplit(".", cut)[0] for cut in range(module.count(".") + 1)]
    return next((parent for parent in parents if parent in ALLOWED), "")


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of everything that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_package(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a module imports, without the package's name."""
    for name in imported(tree):
        package, _, module = name.partition(".")
        if package == "vllm_vtw" and module and is_module(module):
            yield module


def is_allowed(module: str, target: str) -> bool:
    allowed = ALLOWED.get(room(module), set()) | MAY_ALSO.get(module, set())
    return room(target) == room(module) or room(target) in allowed or target in allowed


@pytest.mark.parametrize("module", TREES)
def test_a_room_imports_only_what_it_may(module: str):
    # `from vllm_vtw.worker import runner_v1` also names the room, but uses only the file.
    targets = set(of_package(TREES[module]))
    targets -= {target for target in targets if any(other.startswith(f"{target}.") for other in targets)}
    assert [target for target in sorted(targets) if not is_allowed(module, target)] == []


def test_every_rule_is_needed():
    """A rule allows nothing that its room does not import."""
    used: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        for target in of_package(tree):
            used.setdefault(room(module), set()).update({target, room(target)})
            used.setdefault(module, set()).update({target, room(target)})
    for name, allowed in (*ALLOWED.items(), *MAY_ALSO.items()):
        assert allowed <= used.get(name, set()), f"{name} no longer imports all of this"


def test_the_rooms_are_those_of_the_package():
    folders = {
        path.parent.relative_to(PACKAGE).as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
    }
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert ALLOWED.keys() == (folders - {"."}) | (files - {"__init__"})


def at_import(tree: ast.Module) -> Iterator[str]:
    """The full names of what is imported when the module is, not only in functions or for type checkers."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(ast.Module([node], []))


def test_what_needs_neither_vllm_nor_torch_to_be_imported():
    """Imports are followed as in Python, including those of the packages that contain a module."""

    def heavy(module: str, seen: set[str]) -> set[str]:
        if module in seen or module not in TREES:
            return set()
        seen.add(module)
        names = set(at_import(TREES[module]))
        found = {name.partition(".")[0] for name in names} & HEAVY
        parents = [module.rsplit(".", cut)[0] for cut in range(1, module.count(".") + 1)]
        ours = {name.partition(".")[2] for name in names if name.partition(".")[0] == "vllm_vtw"}
        return found.union(*(heavy(name, seen) for name in (*ours, *parents)))

    light = [module for module in TREES if room(module) in WITHOUT_HEAVY or module in WITHOUT_HEAVY]
    assert {module: found for module in light if (found := heavy(module, set()))} == {}


def test_the_search_runs_without_vllm():
    wrong = {
        module
        for module, tree in TREES.items()
        if module.startswith("search") and any(name.partition(".")[0] == "vllm" for name in imported(tree))
    }
    assert not wrong


def test_a_forbidden_import_is_found():
    for module, target in (
        ("search.model", "commands.search_setup"),
        ("worker.gates", "kv.scheduler"),
        ("kv.scheduler", "worker.current_step"),
        ("search.dyvte.exit_labels", "search.schedules.gsearch"),
        ("rankings.base", "policy"),
        ("retention", "kv.spec"),
    ):
        assert module in TREES
        assert is_module(target)
        assert not is_allowed(module, target)
