"""Trains DyVTE's gates (arXiv 2411.19628) on what they read of samples; the model itself is not touched.

Every layer has a gate of its own. They learn side by side, from the same samples, and share nothing.
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
HOLD_OUT = 5
"""Of so many samples one is not trained on."""


@dataclass(frozen=True)
class TrainingSettings:
    """Of a training.

    Attributes:
        epochs: Times that every sample is learned from.
        learning_rate: AdamW's highest; it warms up over 3% of the steps and falls along a cosine.
        batch_size: Samples of a step.
        seed: Of first weights and of the samples' order.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Trained:
    """Gates, and how they learned.

    Attributes:
        gates: By position in layers.
        curves: By epoch: "loss" of the training samples, "held_out_loss" and "held_out_accuracy" of the
            others, each a number for every layer.
    """

    gates: list[nn.Sequential]
    curves: list[dict[str, list[float]]]


def held_out(samples: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which samples are not trained on, shape `(samples,)`; drawn, as tasks come by turns."""
    return np.random.default_rng(seed).permutation(samples) < samples // HOLD_OUT


def train(
    read: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    settings: TrainingSettings,
    checkpoint: Path,
    of: dict[str, Any],
    device: torch.device,
    after_epoch: Callable[[int], None],
) -> Trained:
    """Trains the gates of all layers, from the checkpoint on where it is of the same training.

    Args:
        read: What gates read, shape `(samples, layers, 2 * hidden_size)`.
        labels: 1 where visual tokens may leave, shape `(samples, layers)`.
        settings: Of the training.
        checkpoint: Where every epoch's end is kept.
        of: What else tells this training from others.
        device: Where it runs.
        after_epoch: Told how many epochs have ended.
    """
    torch.manual_seed(settings.seed)
    gates = [new_gate(read.shape[2] // 2).to(device) for _ in range(read.shape[1])]
    inputs, targets = torch.from_numpy(read), torch.from_numpy(labels)
    out = torch.from_numpy(held_out(len(read), settings.seed))
    learned, unseen = (~out).nonzero()[:, 0], out.nonzero()[:, 0]
    steps = -(-len(learned) // settings.batch_size) * settings.epochs
    optimizer = torch.optim.AdamW(
        [weight for gate in gates for weight in gate.parameters()],
        lr=settings.learning_rate,
        weight_decay=0,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    curves: list[dict[str, list[float]]] = []
    parts = nn.ModuleList(gates), optimizer, schedule
    told = of | {"settings": asdict(settings)}
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if kept["of"] == told:
            for part, state in zip(parts, kept["states"], strict=True):
                part.load_state_dict(state)
            curves = kept["curves"]
        del kept
    after_epoch(len(curves))
    for epoch in range(len(curves), settings.epochs):
        order = torch.Generator().manual_seed(settings.seed + epoch)
        losses = torch.zeros(len(gates))
        for batch in learned[torch.randperm(len(learned), generator=order)].split(settings.batch_size):
            of_layers = _losses(gates, inputs[batch].to(device), targets[batch].to(device))
            optimizer.zero_grad()
            of_layers.sum().backward()
            optimizer.step()
            schedule.step()
            losses += of_layers.detach().cpu() * len(batch)
        with torch.no_grad():
            seen, wanted = inputs[unseen].to(device), targets[unseen].to(device)
            says = torch.stack([gate(seen[:, at]).argmax(-1) for at, gate in enumerate(gates)], 1)
            curves.append(
                {
                    "loss": (losses / len(learned)).tolist(),
                    "held_out_loss": _losses(gates, seen, wanted).tolist(),
                    "held_out_accuracy": (says == wanted).float().mean(0).tolist(),
                }
            )
        states = [part.state_dict() for part in parts]
        torch.save({"of": told, "states": states, "curves": curves}, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        after_epoch(epoch + 1)
    return Trained(gates, curves)


def _losses(gates: list[nn.Sequential], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each layer's gate, shape `(layers,)`."""
    return torch.stack([cross_entropy(gate(inputs[:, at]), targets[:, at]) for at, gate in enumerate(gates)])
