# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests that broken or hostile policy and gates files are refused with one short line."""

import json
import os
import pickle
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from vllm.engine.arg_utils import EngineArgs

from benchmarks.quality.model import CHECKPOINT
from tests.search.command import vtw
from vllm_vtw.config import ModelShape, VTWConfig
from vllm_vtw.gates import load_gates, new_gate, save_gates
from vllm_vtw.policy import MAX_POLICY_BYTES, Gate, Policy
from vllm_vtw.untrusted_files import MAX_SHOWN, shorten

HIDDEN, LAYERS = 16, (3, 5)
MODEL = ModelShape("llava", "llama", 8, HIDDEN)
GATE = {"weights": "gates.safetensors", "sha256": "0" * 64, "thresholds": [0, 1.5]}
GATED = {
    "format": "vllm-vtw-policy/1",
    "model": MODEL.as_dict(),
    "stages": [{"layer": 3, "keep": 0}, {"layer": 5, "keep": 0.0}],
    "ranking": None,
    "gate": GATE,
    "training": {"data_sha256": "0" * 64},
}
RANKED = GATED | {
    "stages": [{"layer": 3, "keep": 0.5}, {"layer": 5, "keep": 0.25}],
    "ranking": "last-token-attention",
    "gate": None,
}
SHARES = RANKED | {"stages": [{"layer": 3, "keep": 0.5}, {"layer": 5, "keep": 0}], "keeps": [0.75, 0.25, 0.5]}
CHOSEN = GATED | {"gate": None, "layer": 8, "tasks": {"ocr": 8, "yes-no": 3}}
LONGEST_MESSAGE = 1000


def one_short_line(message: str) -> str:
    assert len(message.splitlines()) <= 1
    assert len(message) < LONGEST_MESSAGE
    return message


def refusal(file: Path) -> str:
    """The message with which a policy file is refused."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - every message is looked at
        VTWConfig.parse({"policy": str(file)}, MODEL, prefix_caching=True)
    assert str(file) in str(refused.value)
    return one_short_line(str(refused.value))


def written(folder: Path, content: Any) -> Path:
    file = folder / "policy.json"
    file.write_text(json.dumps(content))
    return file


def with_gate(**changed: Any) -> bytes:
    return json.dumps(GATED | {"gate": GATE | changed}).encode()


def test_the_file_that_others_are_made_from_is_good(tmp_path):
    policy = Policy.read(written(tmp_path, GATED), MODEL.as_dict())
    assert policy.gate == Gate(str(tmp_path / "gates.safetensors"), "0" * 64, (0, 1.5))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (with_gate(thresholds=[0, 10**400]), "'thresholds'] = [0, 1000"),
        (with_gate().replace(b"1.5", b"1" + 5000 * b"0"), "cannot be read as JSON: Exceeds the limit"),
        (with_gate().replace(b"1.5", b"1e999"), "[0, inf]: has to be a list of finite numbers"),
        (with_gate().replace(b"1.5", b"NaN"), "[0, nan]: has to be a list of finite numbers"),
        (with_gate().replace(b"1.5", b"-Infinity"), "[0, -inf]: has to be a list of finite numbers"),
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (b'{"a":' * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (b"\xed\xa0\x80", "cannot be read as JSON"),
        (b"\xff\xfe\xfd", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (with_gate()[:-1], "cannot be read as JSON"),
        (json.dumps(GATED | {"model": {"model_type": "x" * 10**6}}).encode(), "made for another model: {"),
        (json.dumps(GATED | {"model": [[["x" * 99] * 9] * 9] * 9}).encode(), "made for another model: ["),
        (json.dumps(GATED | {"ranking": "a\nb" * 10**5}).encode(), "has to be None"),
        (json.dumps(GATED | {"stages": [{"layer": 10**400, "keep": 0}]}).encode(), "from 1 to 7"),
        (json.dumps(GATED | {"stages": [{"layer": 3, "keep": 10**400}]}).encode(), "less than 1"),
        (json.dumps(GATED | {"stages": [{"layer": 3, "keep": 0, "x" * 10**6: 0}]}).encode(), "the keys"),
        (json.dumps(RANKED | {"keeps": [0.1]}).encode(), "unless exactly one stage keeps some visual tokens"),
        (json.dumps(CHOSEN | {"keeps": [0.1]}).encode(), "unless exactly one stage keeps some visual tokens"),
        (
            json.dumps(SHARES | {"keeps": [0.1, 1]}).encode(),
            "'keeps' = [0.1, 1]: has to be a list of numbers",
        ),
        (json.dumps(SHARES | {"keeps": [0]}).encode(), "'keeps' = [0]: has to be a list of numbers"),
        (json.dumps(SHARES | {"keeps": 0.1}).encode(), "'keeps' = 0.1: has to be a list of numbers"),
        (json.dumps(SHARES | {"keeps": ["x" * 10**6]}).encode(), "has to be a list of numbers"),
        (with_gate(weights="../gates.safetensors"), "the name of a file in the policy file's folder"),
        (with_gate(weights="../../etc/passwd"), "the name of a file in the policy file's folder"),
        (with_gate(weights="/etc/passwd"), "the name of a file in the policy file's folder"),
        (with_gate(weights="sub/gates.safetensors"), "the name of a file in the policy file's folder"),
        (with_gate(weights=".."), "the name of a file in the policy file's folder"),
        (with_gate(weights="."), "the name of a file in the policy file's folder"),
        (with_gate(weights=""), "the name of a file in the policy file's folder"),
        (with_gate(weights="a\nb"), "the name of a file in the policy file's folder"),
        (with_gate(weights="a\0b"), "the name of a file in the policy file's folder"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_contents(content, why, tmp_path):
    (tmp_path / "policy.json").write_bytes(content)
    assert why in refusal(tmp_path / "policy.json")


@pytest.mark.parametrize("key", ["gates", "Ranking", ""])
def test_a_misspelt_key_is_not_passed_over(key, tmp_path):
    content = {name: value for name, value in GATED.items() if name != "gate"} | {key: GATE}
    (tmp_path / "policy.json").write_text(json.dumps(content))
    said = refusal(tmp_path / "policy.json")
    assert f"'{key}': unknown key; allowed are format, model, stages, ranking, keeps, gate" in said


def test_shares_that_requests_may_choose(tmp_path):
    policy = Policy.read(written(tmp_path, SHARES), MODEL.as_dict())
    assert policy.offered_keeps == (0.25, 0.5, 0.75)
    assert [stage.keep for stage in policy.keeping(0.25).stages] == [0.25, 0]
    assert [stage.keep for stage in policy.keeping(1).stages] == [1, 0]
    assert policy.most_kept(101) == 76
    assert Policy.from_json(policy.to_json(MODEL.as_dict()), MODEL.as_dict()) == policy
    without = Policy.from_json(SHARES | {"keeps": []}, MODEL.as_dict())
    assert without.offered_keeps == (0.5,)


def test_files_that_are_none(tmp_path):
    assert "Is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "it is not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    assert "it is not a regular file" in refusal(tmp_path / "device")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refusal(tmp_path / "loop")
    assert "No such file" in refusal(tmp_path / "nothing")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10 << 30)  # a sparse file, which takes no space on the disk
    assert f"it has {10 << 30} bytes, more than the {MAX_POLICY_BYTES} that" in refusal(tmp_path / "huge")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 10_000, "a\nb"])
def test_paths_that_are_none(name):
    with pytest.raises(ValueError, match="cannot be read as JSON") as refused:
        VTWConfig.parse({"policy": name}, MODEL, prefix_caching=True)
    one_short_line(str(refused.value))


HUGE: list[Any] = [10**400, "\ud800\n" * 10**5, [[[["x" * 999] * 9] * 9] * 9] * 9, {"x" * 999: {}}]


@pytest.mark.parametrize("value", [*HUGE, 10**5000], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("key", ["layer", "policy", "align", "unknown", "x" * 10**6])
def test_options_are_shown_in_short(key, value):
    with pytest.raises(ValueError, match="--additional-config") as refused:
        VTWConfig.parse({key: value}, MODEL, prefix_caching=True)
    one_short_line(str(refused.value))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(HUGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(ANYTHING)
def test_a_value_is_shown_in_one_short_line(value):
    assert len(one_short_line(shorten(value))) <= MAX_SHOWN


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside a JSON value, including itself."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The content with another value at one place."""
    if not place:
        return value
    content = deepcopy(content)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return content


@given(st.data(), st.sampled_from([GATED, RANKED, CHOSEN]), ANYTHING)
def test_anything_anywhere_is_taken_or_refused_in_one_short_line(data, content, value):
    """The policy is given as in the options of engine processes, as an object in place of a file."""
    content = changed(content, data.draw(st.sampled_from(places(content))), value)
    try:
        VTWConfig.parse({"policy": content}, MODEL, prefix_caching=True)
    except ValueError as error:
        one_short_line(str(error))


def garbled(content: bytes) -> st.SearchStrategy[bytes]:
    """The content, either cut off or with a few bytes replaced."""

    def with_other(at: int, other: bytes) -> bytes:
        return content[:at] + other + content[at + len(other) :]

    places = st.integers(0, len(content) - 1)
    return st.builds(lambda at: content[:at], places) | st.builds(
        with_other, places | st.integers(0, min(300, len(content) - 1)), st.binary(min_size=1, max_size=8)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder for files that each example overwrites."""
    return tmp_path_factory.mktemp("files")


@given(garbled(json.dumps(GATED).encode()))
def test_garbled_policies_are_taken_or_refused_in_one_short_line(folder, content):
    file = folder / "policy.json"
    file.write_bytes(content)
    try:
        policy = Policy.read(file, MODEL.as_dict())
    except ValueError as error:
        one_short_line(str(error))
    else:
        assert policy.gate is None or Path(policy.gate.weights).parent == folder


GATES = {layer: new_gate(HIDDEN) for layer in LAYERS}
STATES = {f"{n}.{name}": tensor for n, one in GATES.items() for name, tensor in one.state_dict().items()}


@pytest.fixture(scope="module")
def gate(folder) -> Gate:
    file = folder / "gates.safetensors"
    return Gate(str(file), save_gates(GATES, file), (0, 0))


def of(content: bytes, folder: Path) -> Gate:
    """Writes a gates file and returns a `Gate` with its path and digest."""
    (folder / "other.safetensors").write_bytes(content)
    return Gate(str(folder / "other.safetensors"), sha256(content).hexdigest(), (0, 0))


def refused(gate: Gate, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        load_gates(gate, LAYERS, HIDDEN)
    assert gate.weights in str(error.value)
    one_short_line(str(error.value))


def test_gates_that_are_not_those_of_the_policy(gate, folder):
    loaded = [weight for one in load_gates(gate, LAYERS, HIDDEN) for weight in one.parameters()]
    assert {weight.dtype for weight in loaded} == {torch.float32}
    content = Path(gate.weights).read_bytes()
    retrained = save({name: tensor + 1 for name, tensor in STATES.items()})
    refused(replace(of(retrained, folder), sha256=gate.sha256), "are not those of the policy")
    refused(replace(gate, sha256="a\nb" * 10**5), "are not those of the policy")
    refused(replace(of(content[:-1], folder), sha256=gate.sha256), "are not those of the policy")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (save(STATES)[:-1], "SafetensorError"),
        (pickle.dumps(STATES), "SafetensorError"),
        (b"", "SafetensorError"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "SafetensorError"),
        (save({"3.0.weight": STATES["3.0.weight"]}), r"3\.2\.weight is missing"),
        (save(STATES | {"5.0.weight": torch.zeros(2048, 2)}), r"5\.0\.weight has .* shape \(2048, 2\)"),
        (save(STATES | {"5.0.weight": torch.zeros([1] * 999)}), r"5\.0\.weight has .* shape \(1, 1"),
        *(
            (save({name: tensor.to(dtype) for name, tensor in STATES.items()}), f"has the type {dtype}")
            for dtype in (torch.int8, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.float64)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gates_of_a_right_digest_that_are_none(content, why, folder):
    refused(of(content, folder), rf"are not for layers \[3, 5\] of a model of hidden size 16: .*{why}")


def test_links(gate, tmp_path):
    """Links are followed, because snapshots of the Hugging Face Hub consist of them."""
    (tmp_path / "gates.safetensors").symlink_to(gate.weights)
    (tmp_path / "blob").write_text(json.dumps(GATED | {"gate": GATE | {"sha256": gate.sha256}}))
    (tmp_path / "policy.json").symlink_to(tmp_path / "blob")
    linked = Policy.read(tmp_path / "policy.json", MODEL.as_dict()).gate
    assert linked is not None
    assert len(load_gates(linked, LAYERS, HIDDEN)) == 2
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10 << 30)
    (tmp_path / "text").write_text("something else")
    os.mkfifo(tmp_path / "pipe")
    for target, why in (
        ("/dev/zero", "it is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path / "huge", f"it has {10 << 30} bytes, more than the "),
        (tmp_path / "text", "are not those of the policy"),
        (tmp_path / "nothing", "No such file"),
    ):
        (tmp_path / "gates.safetensors").unlink()
        (tmp_path / "gates.safetensors").symlink_to(target)
        refused(linked, why)


@example(save(STATES))
@given(garbled(save(STATES)))
def test_garbled_gates_are_loaded_or_refused_in_one_short_line(folder, content):
    """The digest in the policy file is that of the garbled file."""
    try:
        gates = load_gates(of(content, folder), LAYERS, HIDDEN)
    except ValueError as error:
        one_short_line(str(error))
    else:
        assert [weight.dtype for one in gates for weight in one.parameters()] == [torch.float32] * 4


BROKEN = {
    "deep": b"[" * 100_000,
    "large": with_gate(thresholds=[0, 10**400]),
    "another model": json.dumps(GATED | {"model": ["x\n" * 10**6]}).encode(),
    "elsewhere": with_gate(weights="../gates.safetensors"),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", ["plan", "dyvte eval"])
def test_a_command_ends_with_one_line(command, content, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "prompt": "What?"})
    (tmp_path / "data.jsonl").write_text(f"{line}\n" * 8)
    file = tmp_path / "policy.json"
    shape = json.loads(CHECKPOINT.joinpath("config.json").read_text())["text_config"]
    num_layers, hidden_size = shape["num_hidden_layers"], shape["hidden_size"]
    # The rest of the policy has to fit the checkpoint, so that only the broken part is refused.
    model = json.dumps(ModelShape("llava", "llama", num_layers, hidden_size).as_dict()).encode()
    file.write_bytes(content.replace(json.dumps(MODEL.as_dict()).encode(), model))
    options = [f"--data={tmp_path / 'data.jsonl'}", f"--out={tmp_path / 'out'}"] if "eval" in command else []
    ended = vtw(*command.split(), str(CHECKPOINT), f"--policy={file}", *options)
    assert (ended.status, ended.out) == (2, ""), ended.err
    assert ended.err.startswith(f"vtw {command}: error: ")
    assert str(file) in one_short_line(ended.err)


def test_an_engine_does_not_start(tmp_path):
    """vLLM raises an error that contains the plugin's message."""
    text = {"num_hidden_layers": 8, "hidden_size": HIDDEN, "num_attention_heads": 2, "vocab_size": 64}
    architecture = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    config = architecture | {"text_config": text | {"model_type": "llama"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file, why in (("pipe", "is not a regular file"), ("gates.safetensors", "is not a regular file")):
        policy = written(tmp_path, GATED)
        (tmp_path / file).unlink(missing_ok=True)
        os.mkfifo(tmp_path / file)
        policy = tmp_path / file if file == "pipe" else policy
        engine = EngineArgs(
            model=str(tmp_path),
            model_impl="vtw",
            skip_tokenizer_init=True,
            additional_config={"vtw": {"policy": str(policy)}},
        )
        with pytest.raises(ValueError, match=f"{tmp_path / file}.*{why}"):
            engine.create_engine_config()
