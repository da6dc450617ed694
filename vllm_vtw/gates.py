"""DyVTE's gates (arXiv 2411.19628), and the file that holds them.

A gate before layer K reads what layer K - 1 makes of a prompt's text behind its last picture: the mean of all
but the last token, and the last token. Of its two logits the second says "leave".
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from vllm_vtw.files import read_file, shorten
from vllm_vtw.policy import Gate

GATE_WIDTH = 2048
MAX_GATES = 128
"""Of a file, in 16 bits: it may have gates for layers that the policy does not use, but no model has more."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def new_gate(hidden_size: int) -> nn.Sequential:
    """A gate as published, `(prompts, 2 * hidden_size)` to `(prompts, 2)`, with Xavier's weights."""
    layers = nn.Linear(2 * hidden_size, GATE_WIDTH, bias=False), nn.Linear(GATE_WIDTH, 2, bias=False)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def gate_features(text: torch.Tensor) -> torch.Tensor:
    """What a gate reads of one prompt, shape `(2 * hidden_size,)`, float32.

    Args:
        text: States of the tokens behind its last picture, two or more, shape `(tokens, hidden_size)`.
    """
    states = text.float()
    return torch.cat([states[:-1].mean(0), states[-1]])


def leave_margins(gate: nn.Module, of_prompts: torch.Tensor) -> torch.Tensor:
    """By how much "leave" is above "stay", shape `(prompts,)`.

    Args:
        gate: One gate, in float32.
        of_prompts: `gate_features` of each prompt, shape `(prompts, 2 * hidden_size)`.
    """
    logits = gate(of_prompts)
    return logits[:, 1] - logits[:, 0]


def save_gates(gates: Mapping[int, nn.Module], file: Path) -> str:
    """Writes gates, by their layer K, to a safetensors file in bfloat16. Returns its SHA-256."""
    tensors = {
        f"{layer}.{name}": tensor.to("cpu", torch.bfloat16).contiguous()
        for layer, gate in gates.items()
        for name, tensor in gate.state_dict().items()
    }
    content = save(tensors)
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_gates(gate: Gate, layers: Sequence[int], hidden_size: int) -> list[nn.Sequential]:
    """The gates of a policy, in float32, on the CPU.

    Args:
        gate: Names the file.
        layers: K of each gate.
        hidden_size: Of the model.

    Raises:
        ValueError: The file is not there, not the one that the policy was made with, or lacks a gate. The
            message is one short line.
    """
    named = f"gates {shorten(gate.weights)}"
    # A megabyte for the names and shapes, which stand before the weights.
    most_bytes = MAX_GATES * 2 * GATE_WIDTH * (2 * hidden_size + 2) + (1 << 20)
    try:
        content = read_file(Path(gate.weights), most_bytes)
    except ValueError as error:
        raise ValueError(
            f"{named}, which the policy file names, cannot be read: {error}. They belong beside it"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != gate.sha256:
        raise ValueError(
            f"{named} are not those of the policy, whose SHA-256 is {shorten(gate.sha256)}: theirs is "
            f"{found}. Keep policy and gates of one training together"
        )
    not_these = f"{named} are not for layers {shorten(list(layers))} of a model of hidden size {hidden_size}"
    try:
        tensors = load(content)
    except Exception as error:  # whatever safetensors and torch raise about a file that somebody made up
        raise ValueError(f"{not_these}: {shorten(error)}") from error
    gates = []
    for layer in layers:
        with torch.device("meta"):
            one = new_gate(hidden_size)
        weights = {}
        for name, wanted in one.state_dict().items():
            tensor = tensors.get(f"{layer}.{name}")
            if tensor is None:
                raise ValueError(f"{not_these}: {layer}.{name} is missing")
            if tensor.shape != wanted.shape or tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{not_these}: {layer}.{name} has the type {tensor.dtype} and the shape "
                    f"{shorten(tuple(tensor.shape))}; it has to hold floating-point "
                    f"numbers of 16 or 32 bits, and have the shape {tuple(wanted.shape)}"
                )
            weights[name] = tensor.float()
        one.load_state_dict(weights, assign=True)
        gates.append(one.requires_grad_(False))
    return gates
