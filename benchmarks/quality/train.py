"""Trains the small LLaVA from scratch, on the CPU or on a GPU.

    python -m benchmarks.quality.train --out FOLDER

First the vision tower alone, then the whole model. Can be stopped at any time: called again, it goes on
from the last checkpoint in FOLDER.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from benchmarks.quality.model import HIDDEN, config, normalised, save, tokenizer
from benchmarks.quality.packing import IGNORE, Batch, Packer
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.vision import PatchReader, pictures

SEED = 0
VISION_ROWS, VISION_STEPS, VISION_LEARNING_RATE = 16, 3_000, 2e-3
ROWS, STEPS, LEARNING_RATE = 4, 16_000, 1e-3
WEIGHT_DECAY = 0.05
WARM_UP = 100  # steps
# The last part of the steps, in which the learning rate falls to 0.
COOL_DOWN = 0.3
VALIDATE_EVERY, VALIDATION_ROWS = 200, 32


def learning_rate(step: int, steps: int) -> float:
    """As a share of the highest: up, level, then down in a line."""
    return min((step + 1) / WARM_UP, 1.0, max((steps - step) / (COOL_DOWN * steps), 0.0))


def logits(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Of the tokens that have a target, in order: `(targets, vocabulary)`."""
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


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, batch: Batch) -> dict[str, float]:
    """The loss, and by task the share of answers that greedy decoding gets right to the last token."""
    belongs = batch.targets != IGNORE
    found, wanted = logits(model, batch), batch.targets[belongs]
    rows = torch.arange(len(batch.ids))[:, None].expand_as(batch.ids)[belongs]
    wrong = found.argmax(-1) != wanted
    failed = set(zip(rows[wrong].tolist(), batch.group[belongs][wrong].tolist(), strict=True))
    asked, right = Counter[str](), Counter[str]()
    for row, tasks in enumerate(batch.tasks):
        for group, task in enumerate(tasks, start=1):
            asked[task] += 1
            right[task] += (row, group) not in failed
    return {"loss": cross_entropy(found, wanted).item()} | {task: right[task] / asked[task] for task in asked}


class Trainer:
    """AdamW over some parameters.

    Args:
        parameters: What is trained.
        highest: The learning rate between warm-up and cool-down.
        steps: How many there will be.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], highest: float, steps: int) -> None:
        self.parameters, self.highest, self.steps = list(parameters), highest, steps
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=highest, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, number: int, loss: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.highest * learning_rate(number, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def train_vision(tower: nn.Module, out: Path, device: str) -> None:
    """Teaches the vision tower what each patch shows; its readers are thrown away."""
    saved = out / "vision.pt"
    if saved.exists():
        tower.load_state_dict(torch.load(saved, map_location=device))
        return
    reader = PatchReader(HIDDEN).to(device)
    trainer = Trainer([*tower.parameters(), *reader.parameters()], VISION_LEARNING_RATE, VISION_STEPS)
    bar = tqdm(range(VISION_STEPS), desc="vision tower", mininterval=5)
    for number in bar:
        pixels, wanted = pictures("train", VISION_ROWS, number)
        features = tower(normalised(pixels.to(device))).last_hidden_state[:, 1:]
        loss, read = reader(features, {name: label.to(device) for name, label in wanted.items()})
        trainer.step(number, loss)
        if number % 100 == 0:
            bar.set_postfix({name: f"{share:.2f}" for name, share in read.items()})
    torch.save(tower.state_dict(), saved)


def train(out: Path, device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    words = tokenizer()
    model = LlavaForConditionalGeneration._from_config(config(words)).to(device)
    tower = model.model.vision_tower
    # As large as what the pixels bring; transformers' 0.02 would leave the patches' places unread for long.
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.3)
    trainer = Trainer(model.parameters(), LEARNING_RATE, STEPS)
    state, done = out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    else:
        train_vision(tower, out, device)
    validation = next(Packer("validation", words).batches(VALIDATION_ROWS)).to(device)
    batches = islice(Packer("train", words).batches(ROWS, start=done), STEPS - done)
    started, losses = time.monotonic(), []
    bar = tqdm(batches, desc="whole model", initial=done, total=STEPS, unit="step", mininterval=5)
    for number, packed in enumerate(bar, start=done):
        batch = packed.to(device)
        loss = cross_entropy(logits(model, batch), batch.targets[batch.targets != IGNORE])
        trainer.step(number, loss)
        losses.append(loss.detach())
        if (number + 1) % VALIDATE_EVERY == 0 or number + 1 == STEPS:
            record = {
                "step": number + 1,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": torch.stack(losses).mean().item(),
            } | validate(model, validation)
            losses.clear()
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.set_postfix({name: f"{value:.2f}" for name, value in record.items() if name in TASKS})
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "step": number + 1,
            }
            torch.save(checkpoint, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    save(model, words, out / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for checkpoints, the log and the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train(options.out, options.device)


if __name__ == "__main__":
    main()
