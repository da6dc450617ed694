# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Prints the documentation's page of refusals and warnings, from the source that has them.

.venv/bin/python -m tools.messages_table > docs/messages.md
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from vllm_vtw.families import ELSEWHERE, WHY_NOT

INTRODUCTION = """\
# Refusals and warnings

What a server says if it does not do what it was asked, and the way out. Three dots stand for what depends on
your options. At start-up, vLLM shows an error at the end of a traceback, and one of the engine's process
before that of the server. A `vtw` command that is given something wrong prints one line, and ends with
status 2. [Troubleshooting](troubleshooting.md) begins with what you see instead.
"""
SECTIONS = {
    "Options of vLLM": ["startup.refusals", "startup.model_config"],
    "Speculative decoding": ["startup.drafters", "capacity"],
    "KV connectors and KV offloading": ["startup.connectors"],
    "Models and attention": [
        "families", "models.registry", "models.served", "models.decoder", "worker.attention_backend",
        "worker.pages", "worker.ranking",
    ],
    "Options of the plugin": ["startup.options", "config"],
    "Policy files and gates": ["policy", "gates", "untrusted_files"],
    "Requests: HTTP 400": ["choice", "models.admission", "models.beam_search"],
    "vLLM's version": ["plugin", "versions"],
    "Requests that end in the engine": ["kv.scheduler"],
    "Warnings in the log": ["kv.startup_log"],
}  # fmt: skip
"""Modules of `vllm_vtw`, by the heading under which their messages are."""
WAY_OUT = re.compile(
    r": (?:\.\.\.)?(?=(?:use|set|remove|serve|send|withdraw|let|raise|install|add|disable|compare|give"
    r"|expected|unknown|this server|the first stage|the plugin has)\b)|:? (?=has to )"
)
"""What stands before the part of a message that says what to do."""


def page() -> str:
    """The page in Markdown, with one table for each heading."""
    parts = [INTRODUCTION]
    for heading, names in SECTIONS.items():
        rows = [row for name in names for row in _rows(importlib.import_module(f"vllm_vtw.{name}"))]
        parts.append(f"## {heading}\n\n| what it says | the way out |\n| --- | --- |\n{''.join(rows)}")
    reasons = "".join(f"| `{name}` | {_cell(reason)} |\n" for name, reason in WHY_NOT.items())
    parts.append(
        f"## Models that are refused with a reason\n\n| class in vLLM | why |\n| --- | --- |\n{reasons}"
    )
    return "\n".join(parts)


def messages(module: ModuleType) -> Iterator[str]:
    """The texts of a module's errors and warnings, in their order, with `...` for what is filled in."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
        match node:
            case ast.Call(func=ast.Name("ValueError" | "RuntimeError"), args=[text, *_]):
                pass
            case ast.Call(func=ast.Name("Refusal"), args=[text, *remedy]):
                text = ast.JoinedStr([text, ast.Constant(": "), *(remedy or [ast.Constant(ELSEWHERE)])])
            case ast.Yield(value=ast.expr() as text):
                pass
            case ast.Call(func=ast.Attribute(attr="append" | "insert"), args=[*_, text]):
                pass
            case ast.Call(func=ast.Attribute(ast.Name("logger"), "warning"), args=[text, *_]):
                pass
            case ast.Call(func=ast.Attribute(attr="_end_with_error"), args=[_, text]):
                text = ast.JoinedStr([ast.Constant("request ... "), text])
            case ast.Call(func=ast.Name("_warn" | "_warn_once"), args=[text, *_]):
                pass
            case ast.Raise(exc=ast.Call(func=ast.Name("_error"), args=[key, _, allowed])):
                where = f'["{name}"]' if (name := _text(key, module)) else ""
                text = ast.JoinedStr([ast.Constant(f'--additional-config ["vtw"]{where} = ...: '), allowed])
            case ast.Assign(targets=[ast.Name(name)], value=text) if name == "REASON":
                pass
            case _:
                continue
        message = _text(text, module)
        if re.search(r"[a-z]+ [a-z]+", message):
            yield message


def _text(node: ast.expr, module: ModuleType) -> str:
    """What a string expression says. A placeholder for a text that the module names is filled in."""
    match node:
        case ast.Constant(value=str() as value):
            return (
                value.replace("%s", "...").replace("%d", "...").replace("%.1f", "...").replace("%.2f", "...")
            )
        case ast.JoinedStr(values=values):
            return "".join(_text(value, module) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, module) + _text(right, module)
        case ast.FormattedValue(value=ast.Name(id=name), conversion=conversion):
            named = getattr(module, name, None)
            if isinstance(named, str):
                return repr(named) if conversion == ord("r") else named
    return "..."


def _rows(module: ModuleType) -> Iterator[str]:
    for message in messages(module):
        said, way_out = (*WAY_OUT.split(message, maxsplit=1), "")[:2]
        yield f"| {_cell(said)} | {_cell(way_out)} |\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
