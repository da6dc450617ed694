"""Policy and gates files that are broken, or meant to do harm: one line, and nothing else happens."""

import json
import os
import pickle
import sys
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from vllm_vtw import cli
from vllm_vtw.gates import load_gates, new_gate, save_gates
from vllm_vtw.policy import MOST_BYTES, Gate, Policy

MODEL = {"model_type": "llava", "num_hidden_layers": 8, "hidden_size": 16}
GATE = {"weights": "gates.safetensors", "sha256": "0" * 64, "thresholds": [0, 1.5]}
GATED = {
    "format": "vllm-vtw-policy/1",
    "model": MODEL,
    "stages": [{"layer": 3, "keep": 0}, {"layer": 5, "keep": 0.0}],
    "ranking": None,
    "gate": GATE,
}
LONGEST_MESSAGE = 800
LAYERS = (3, 5)


def refusal(file: Path) -> str:
    """The one line that reading a file ends with."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - every message is looked at
        Policy.read(file, MODEL)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < LONGEST_MESSAGE
    return str(refused.value)


def test_the_file_that_others_are_made_from_is_good(tmp_path):
    (tmp_path / "policy.json").write_text(json.dumps(GATED))
    policy = Policy.read(tmp_path / "policy.json", MODEL)
    assert policy.gate == Gate(str(tmp_path / "gates.safetensors"), "0" * 64, (0, 1.5))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (json.dumps(GATED).replace("1.5", "1" + 400 * "0"), "has to be a number for every stage"),
        (json.dumps(GATED).replace("1.5", "1" + 5000 * "0"), "cannot be read as JSON"),
        (json.dumps(GATED).replace("1.5", "NaN"), "has to be a number for every stage"),
        ("[" * 100_000 + "]" * 100_000, "cannot be read as JSON"),
        ('{"a":' * 100_000, "cannot be read as JSON"),
        ("\ufeff\ud800", "cannot be read as JSON"),
        (json.dumps(GATED)[:-1], "cannot be read as JSON"),
        (json.dumps(GATED | {"model": {"model_type": "x" * 10**6}}), "made for another model"),
        (json.dumps(GATED | {"gate": GATE | {"weights": "../gates.safetensors"}}), "a file beside it"),
        (json.dumps(GATED | {"gate": GATE | {"weights": "/etc/passwd"}}), "a file beside it"),
        (json.dumps(GATED | {"gate": GATE | {"weights": ".."}}), "a file beside it"),
        (json.dumps(GATED | {"gate": GATE | {"weights": "a\nb"}}), "a file beside it"),
        (json.dumps(GATED | {"gate": GATE | {"sha256": "a\nb"}}), "has to be 64 digits"),
        (json.dumps(GATED | {"stages": [{"layer": 10**400, "keep": 0}]}), "has to be an integer from 1 to 7"),
    ],
)
def test_contents(content, why, tmp_path):
    (tmp_path / "policy.json").write_bytes(content.encode(errors="surrogatepass"))
    assert why in refusal(tmp_path / "policy.json")


def test_files_that_are_none(tmp_path):
    assert "Is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    assert "no regular file" in refusal(tmp_path / "device")
    assert "No such file" in refusal(tmp_path / "nothing")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10 << 30)  # it takes no room on the disk
    assert f"it has {10 << 30} bytes, and may have {MOST_BYTES}" in refusal(tmp_path / "huge")


def test_a_command_ends_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (tmp_path / "policy.json").write_text("[" * 100_000)
    monkeypatch.setattr(
        sys, "argv", ["vtw", "plan", str(tmp_path), "--policy", str(tmp_path / "policy.json")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert "cannot be read as JSON" in said[-1]
    assert "Traceback" not in "".join(said)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(places(GATED)), ANYTHING)
def test_anything_anywhere_is_read_or_refused_in_one_line(place, value):
    content: Any = deepcopy(GATED)
    if place:
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
    else:
        content = value
    said = ""
    try:
        Policy.from_file(content, MODEL)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < LONGEST_MESSAGE


GATES = {layer: new_gate(MODEL["hidden_size"]) for layer in LAYERS}  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Gate:
    file = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    return Gate(str(file), save_gates(GATES, file), (0, 0))


def of(content: bytes, folder: Path) -> Gate:
    """What names a file of this content by its right digest."""
    (folder / "other.safetensors").write_bytes(content)
    return Gate(str(folder / "other.safetensors"), sha256(content).hexdigest(), (0, 0))


def refused(gate: Gate, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        load_gates(gate, LAYERS, 16)
    assert "\n" not in str(error.value)


def test_gates_that_are_not_those_of_the_policy(gate, tmp_path):
    weights = [weight for one in load_gates(gate, LAYERS, 16) for weight in one.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    content = Path(gate.weights).read_bytes()
    swapped = of(save({"3.0.weight": torch.zeros(2048, 32)}), tmp_path)
    refused(swapped, "are not for layers")
    refused(replace(swapped, sha256=gate.sha256), "are not those of the policy")
    refused(of(content[: len(content) // 2], tmp_path), "are not for layers")
    refused(of(pickle.dumps({"3.0.weight": 1}), tmp_path), "are not for layers")
    refused(of(b"", tmp_path), "are not for layers")
    for dtype in (torch.int32, torch.complex64):
        tensors = {f"{n}.{k}": w.to(dtype) for n, one in GATES.items() for k, w in one.state_dict().items()}
        refused(of(save(tensors), tmp_path), "floating.point")
    refused(of(content + b"0" * (100 << 20), tmp_path), "may have")


def test_links(gate, tmp_path):
    """A snapshot of a hub is made of links: one that leads to the right content is good."""
    (tmp_path / "link").symlink_to(gate.weights)
    assert len(load_gates(replace(gate, weights=str(tmp_path / "link")), LAYERS, 16)) == 2
    for target, why in (("/dev/zero", "no regular file"), (tmp_path, "Is a directory")):
        (tmp_path / "none").unlink(missing_ok=True)
        (tmp_path / "none").symlink_to(target)
        refused(replace(gate, weights=str(tmp_path / "none")), why)
    (tmp_path / "text").write_text("something else")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "text")
    refused(replace(gate, weights=str(tmp_path / "elsewhere")), "are not those of the policy")


@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_garbled_gates_are_refused_in_one_line(gate, tmp_path_factory, at, garbage):
    content = bytearray(Path(gate.weights).read_bytes()[:5000])
    content[at : at + len(garbage)] = garbage
    refused(of(bytes(content), tmp_path_factory.getbasetemp()), "are not for layers")
