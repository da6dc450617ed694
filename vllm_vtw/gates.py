# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""DyVTE's gates (arXiv 2411.19628), and the file that holds them.

The gate before layer K reads the output of layer K - 1 for a prompt's text after the last image: the mean
over all tokens but the last one, and the last token. It returns two logits, the first for "stay", the second
for "leave".
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from vllm_vtw.policy import Gate
from vllm_vtw.untrusted_files import read_file, shorten

GATE_WIDTH = 2048
"""The size of a gate's hidden layer."""
MAX_GATES = 128
"""The largest number of gates in a file, with weights of 16 bits. A file may have gates for layers that the
policy does not use, but no model has more layers than that."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The data types that weights in a gates file may have."""


def new_gate(hidden_size: int) -> nn.Sequential:
    """A new gate of the published form, with weights from Xavier initialization.

    It maps features of shape `(prompts, 2 * hidden_size)` to logits of shape `(prompts, 2)`.
    """
    layers = nn.Linear(2 * hidden_size, GATE_WIDTH, bias=False), nn.Linear(GATE_WIDTH, 2, bias=False)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def gate_features(text: torch.Tensor) -> torch.Tensor:
    """The features of one prompt that a gate reads, float32, shape `(2 * hidden_size,)`.

    Args:
        text: States of the tokens after the prompt's last image, shape `(tokens, hidden_size)`. There have
            to be at least two tokens.
    """
    states = text.float()
    return torch.cat([states[:-1].mean(0), states[-1]])


def leave_margins(gate: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The gate's logit for "leave" less its logit for "stay", shape `(prompts,)`.

    Args:
        gate: A gate in float32.
        features: The `gate_features` of each prompt, shape `(prompts, 2 * hidden_size)`.
    """
    logits = gate(features)
    return logits[:, 1] - logits[:, 0]


def save_gates(gates: Mapping[int, nn.Module], file: Path) -> str:
    """Writes gates to a safetensors file, in bfloat16.

    Args:
        gates: The gate before each layer.
        file: The file to write.

    Returns:
        SHA-256 of the file, in hexadecimal digits.
    """
    tensors = {
        f"{layer}.{name}": tensor.to("cpu", torch.bfloat16).contiguous()
        for layer, gate in gates.items()
        for name, tensor in gate.state_dict().items()
    }
    content = save(tensors)
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_gates(gate: Gate, layers: Sequence[int], hidden_size: int) -> list[nn.Sequential]:
    """Reads the gates of a policy from their file.

    Args:
        gate: The file's path and SHA-256.
        layers: The layers that the policy has gates before.
        hidden_size: The model's hidden size.

    Returns:
        The gate before each of `layers`, in float32, on the CPU.

    Raises:
        ValueError: The file cannot be read, is not the one that the policy was made with, or lacks a gate.
            The message is one short line.
    """
    named = f"gates {shorten(gate.weights)}"
    # The header of a safetensors file, with the tensors' names and shapes, takes less than the last megabyte.
    most_bytes = MAX_GATES * 2 * GATE_WIDTH * (2 * hidden_size + 2) + (1 << 20)
    try:
        content = read_file(Path(gate.weights), most_bytes)
    except ValueError as error:
        raise ValueError(
            f"{named} cannot be read: {error}. Put the file that the policy's 'gate' names into the policy "
            "file's folder"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != gate.sha256:
        raise ValueError(
            f"{named} are not those of the policy: the file's SHA-256 is {found}, and the policy names "
            f"{shorten(gate.sha256)}. Use the policy and the gates of one training together"
        )
    wrong_file = f"{named} are not for layers {shorten(list(layers))} of a model of hidden size {hidden_size}"
    try:
        tensors = load(content)
    except Exception as error:  # safetensors and torch raise various errors for files that are not valid
        raise ValueError(f"{wrong_file}: {shorten(error)}") from error
    gates = []
    for layer in layers:
        with torch.device("meta"):
            loaded = new_gate(hidden_size)
        weights = {}
        for name, wanted in loaded.state_dict().items():
            tensor = tensors.get(f"{layer}.{name}")
            if tensor is None:
                raise ValueError(f"{wrong_file}: {layer}.{name} is missing")
            if tensor.shape != wanted.shape or tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{wrong_file}: {layer}.{name} has the type {tensor.dtype} and the shape "
                    f"{shorten(tuple(tensor.shape))}; it has to have a floating-point type of 16 or 32 bits "
                    f"and the shape {tuple(wanted.shape)}"
                )
            weights[name] = tensor.float()
        loaded.load_state_dict(weights, assign=True)
        gates.append(loaded.requires_grad_(False))
    return gates
