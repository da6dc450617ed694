# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Trains the small LLaVA from scratch, on the CPU or on a GPU.

    python -m benchmarks.quality.train --out FOLDER

It first trains only the vision tower, for a few minutes, and then the whole model. If it is interrupted and
run again, it goes on from the last checkpoint in FOLDER.
"""

import argparse
import hashlib
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from benchmarks.quality.model import HIDDEN, config, normalised, save, tokenizer
from benchmarks.quality.muon import Muon
from benchmarks.quality.packing import IGNORE, Batch, Packer
from benchmarks.quality.plots import plot_training
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.vision import PatchReader, pictures

SEED = 0
VISION_ROWS, VISION_STEPS = 16, 1_200
ROWS, STEPS = 4, 8_000
MUON_RATE, ADAMW_RATE, WEIGHT_DECAY = 2e-3, 1e-3, 0.05
WARM_UP = 100  # steps
# The fraction of the steps at the end in which the learning rate falls to 0.
COOL_DOWN = 0.3
VALIDATE_EVERY, VALIDATION_ROWS = 250, 64


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a fraction of the highest: it rises, stays, and falls linearly."""
    return min((step + 1) / WARM_UP, 1.0, max((steps - step) / (COOL_DOWN * steps), 0.0))


def logits(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The logits of the tokens that have a target, shape `(targets, vocabulary)`."""
    text = model.model.language_model
    visual = torch.cat(
        list(model.model.get_image_features(pixel_values=normalised(batch.pixels)).pooler_output)
    )
    hidden = text.embed_tokens(batch.ids)
    is_visual = batch.ids == model.config.image_token_id
    hidden = hidden.masked_scatter(is_visual[..., None], visual)
    out = text(
        inputs_embeds=hidden, attention_mask=batch.mask(), position_ids=batch.positions, use_cache=False
    )
    return model.lm_head(out.last_hidden_state[batch.targets != IGNORE])


def weighted_loss(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The cross-entropy of a batch, as a mean weighted by `Batch.weights`."""
    belongs = batch.targets != IGNORE
    losses = cross_entropy(logits(model, batch), batch.targets[belongs], reduction="none")
    return losses @ batch.weights[belongs] / batch.weights.sum()


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, batch: Batch) -> dict[str, float]:
    """The loss, and for each task the fraction of answers that greedy decoding gets completely right."""
    belongs = batch.targets != IGNORE
    found, wanted = logits(model, batch), batch.targets[belongs]
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None].expand_as(batch.ids)[belongs]
    wrong = found.argmax(-1) != wanted
    failed = set(zip(rows[wrong].tolist(), batch.group[belongs][wrong].tolist(), strict=True))
    asked, right = Counter[str](), Counter[str]()
    for row, tasks in enumerate(batch.tasks):
        for group, task in enumerate(tasks, start=1):
            asked[task] += 1
            right[task] += (row, group) not in failed
    return {"loss": cross_entropy(found, wanted).item()} | {task: right[task] / asked[task] for task in asked}


def recipe() -> str:
    """A SHA-256 of the code that a training's result depends on."""
    names = ("scenes", "tasks", "model", "packing", "vision", "muon", "train")
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def write_state(state: dict[str, Any], path: Path) -> None:
    """Writes a training's state to a file. If it is interrupted, the file stays as it was."""
    new = path.with_suffix(".new")
    torch.save(state | {"recipe": recipe()}, new)
    new.replace(path)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a file of `write_state`. The process exits if another version of the code wrote it."""
    state: dict[str, Any] = torch.load(path, map_location="cpu")
    if state["recipe"] != recipe():
        sys.exit(f"{path} comes from other code: remove it, or train into another folder")
    return state


class Trainer:
    """Trains a model with Muon for the matrices of layers, and with AdamW for all other parameters.

    Args:
        model: The model. All of its parameters are trained.
        steps: The number of steps of the training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
        self.optimizers = [
            Muon(matrices, MUON_RATE, WEIGHT_DECAY),
            torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, steps=steps))
            for optimizer in self.optimizers
        ]

    def step(self, loss: torch.Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()

    def save(self, path: Path, log: list[dict[str, float]]) -> None:
        write_state({"log": log, "parts": [part.state_dict() for part in self._parts()]}, path)

    def load(self, path: Path) -> list[dict[str, float]]:
        """Loads what `save` wrote, and returns the log. Its last record is that of the last step."""
        saved = read_state(path)
        for part, state in zip(self._parts(), saved["parts"], strict=True):
            part.load_state_dict(state)
        log: list[dict[str, float]] = saved["log"]
        return log

    def _parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *self.schedules]


def train_vision(tower: nn.Module, out: Path, device: str) -> None:
    """Trains the vision tower to tell what each patch shows, with a `PatchReader` that is then discarded."""
    saved = out / "vision.pt"
    if saved.exists():
        tower.load_state_dict(read_state(saved)["tower"])
        return
    reader = PatchReader(HIDDEN).to(device)
    trainer = Trainer(nn.ModuleList([tower, reader]), VISION_STEPS)
    bar = tqdm(range(VISION_STEPS), desc="vision tower", unit="step", mininterval=5)
    for number in bar:
        pixels, wanted = pictures(VISION_ROWS, number)
        features = tower(normalised(pixels.to(device))).last_hidden_state[:, 1:]
        loss, read = reader(features, {name: label.to(device) for name, label in wanted.items()})
        trainer.step(loss)
        if number % 100 == 0:
            bar.set_postfix({name: f"{share:.2f}" for name, share in read.items()})
    write_state({"tower": tower.state_dict()}, saved)


def initialise(model: LlavaForConditionalGeneration) -> None:
    """Draws initial weights with which input reaches deep layers.

    transformers' own initial weights are made for far wider models.
    """
    places, text = model.model.vision_tower.embeddings.position_embedding, model.model.language_model
    nn.init.normal_(places.weight, std=0.3)  # about as large as what comes from pixels
    nn.init.normal_(text.embed_tokens.weight, std=0.5)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for layer in text.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= (2 * len(text.layers)) ** -0.5


def train(out: Path, device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    words = tokenizer()
    model = LlavaForConditionalGeneration._from_config(config(words)).to(device)
    initialise(model)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    trainer, state = Trainer(model, STEPS), out / "state.pt"
    log: list[dict[str, float]] = []
    if state.exists():
        log = trainer.load(state)
    else:
        train_vision(model.model.vision_tower, out, device)
    done, spent = (int(log[-1]["step"]), log[-1]["seconds"]) if log else (0, 0.0)
    validation = next(Packer("validation", words).batches(VALIDATION_ROWS)).to(device)
    batches = islice(Packer("train", words).batches(ROWS, start=done), STEPS - done)
    losses: list[float] = []
    started = time.monotonic() - spent
    bar = tqdm(batches, desc="whole model", initial=done, total=STEPS, unit="step", mininterval=5)
    for step, packed in enumerate(bar, start=done + 1):
        loss = weighted_loss(model, packed.to(device))
        trainer.step(loss)
        losses.append(loss.item())
        if step % VALIDATE_EVERY == 0 or step == STEPS:
            record = {
                "step": step,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": sum(losses) / len(losses),
            } | validate(model, validation)
            losses.clear()
            bar.set_postfix({name: f"{value:.2f}" for name, value in record.items() if name in TASKS})
            log.append(record)
            trainer.save(state, log)
    save(model, words, out / "checkpoint")
    plot_training(log, out / "checkpoint" / "training.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for checkpoints, the log and the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train(options.out, options.device)


if __name__ == "__main__":
    main()
