# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Trains DyVTE's gates (arXiv 2411.19628) on features that were collected before. The model is not needed.

Every layer has a gate of its own. The gates are trained together on the same samples, but share no weights.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from vllm_vtw.gates import new_gate

WARM_UP = 0.03
"""The fraction of the steps over which the learning rate warms up, as published."""
HOLD_OUT = 5
"""One in `HOLD_OUT` samples is held out of training."""


@dataclass(frozen=True)
class TrainingSettings:
    """The hyperparameters of a training.

    Attributes:
        epochs: The number of passes over the training samples.
        learning_rate: AdamW's largest learning rate. It warms up over `WARM_UP` of the steps and then decays
            along a cosine.
        batch_size: The number of samples in a step.
        seed: The seed of the initial weights, the held-out samples and the order of the others.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Trained:
    """Trained gates, and the curves of their training.

    Attributes:
        gates: The gate of each layer.
        curves: For each epoch, "loss" on the training samples, and "held_out_loss" and "held_out_accuracy" on
            the others. Each is a list with a number for every layer. Losses are in nats.
    """

    gates: list[nn.Sequential]
    curves: list[dict[str, list[float]]]


def held_out(samples: int, seed: int) -> npt.NDArray[np.bool_]:
    """Whether each sample is held out of training, shape `(samples,)`.

    The held-out samples are drawn at random. Samples of different tasks take turns, so with five tasks every
    fifth sample would be of the same task.

    Args:
        samples: The number of samples.
        seed: The seed of the draw.
    """
    return np.random.default_rng(seed).permutation(samples) < samples // HOLD_OUT


def train(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    settings: TrainingSettings,
    checkpoint: Path,
    identity: dict[str, Any],
    device: torch.device,
    after_epoch: Callable[[int], None],
) -> Trained:
    """Trains the gates of all layers.

    Args:
        features: The features that gates read, shape `(samples, layers, 2 * hidden_size)`.
        labels: 1 if the visual tokens of a sample may leave at a layer, else 0, shape `(samples, layers)`.
        settings: The hyperparameters.
        checkpoint: The file in which the state is saved after every epoch. If it exists and has the same
            `settings` and `identity`, the training goes on from there. If not, it is overwritten.
        identity: What distinguishes this training from others beside `settings`, such as the samples.
        device: The device that computes.
        after_epoch: Called with the number of complete epochs, at the start and after every epoch.
    """
    torch.manual_seed(settings.seed)
    gates = [new_gate(features.shape[2] // 2).to(device) for _ in range(features.shape[1])]
    inputs, targets = torch.from_numpy(features), torch.from_numpy(labels)
    is_held_out = torch.from_numpy(held_out(len(features), settings.seed))
    learned, held_out_samples = (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    steps = -(-len(learned) // settings.batch_size) * settings.epochs
    optimizer = torch.optim.AdamW(
        [weight for gate in gates for weight in gate.parameters()],
        lr=settings.learning_rate,
        weight_decay=0,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    curves: list[dict[str, list[float]]] = []
    parts = nn.ModuleList(gates), optimizer, schedule
    identity = identity | {"settings": asdict(settings)}
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if kept["of"] == identity:
            for part, state in zip(parts, kept["states"], strict=True):
                part.load_state_dict(state)
            curves = kept["curves"]
        del kept  # Frees a second copy of the gates and of the optimizer's states.
    after_epoch(len(curves))
    for epoch in range(len(curves), settings.epochs):
        order = torch.Generator().manual_seed(settings.seed + epoch)
        losses = torch.zeros(len(gates))
        for batch in learned[torch.randperm(len(learned), generator=order)].split(settings.batch_size):
            layer_losses = _losses(gates, inputs[batch].to(device), targets[batch].to(device))
            optimizer.zero_grad()
            layer_losses.sum().backward()
            optimizer.step()
            schedule.step()
            losses += layer_losses.detach().cpu() * len(batch)
        with torch.no_grad():
            test_inputs, test_targets = (
                inputs[held_out_samples].to(device),
                targets[held_out_samples].to(device),
            )
            decisions = torch.stack([gate(test_inputs[:, at]).argmax(-1) for at, gate in enumerate(gates)], 1)
            curves.append(
                {
                    "loss": (losses / len(learned)).tolist(),
                    "held_out_loss": _losses(gates, test_inputs, test_targets).tolist(),
                    "held_out_accuracy": (decisions == test_targets).float().mean(0).tolist(),
                }
            )
        states = [part.state_dict() for part in parts]
        torch.save({"of": identity, "states": states, "curves": curves}, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        after_epoch(epoch + 1)
    return Trained(gates, curves)


def _losses(gates: list[nn.Sequential], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each layer's gate, shape `(layers,)`."""
    return torch.stack([cross_entropy(gate(inputs[:, at]), targets[:, at]) for at, gate in enumerate(gates)])
