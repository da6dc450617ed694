# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures how many draft tokens of a trained EAGLE head are accepted, in stock vLLM and at several K.

    python -m benchmarks.quality.drafts [--layers 12,9,6] [--samples 200] [--out FILE.json]

It trains a head (EAGLE, arXiv 2401.15077) on states of the full model, with questions of the validation
split, and serves the test split with it. Every engine answers a second time without drafts, and the benchmark
fails if an answer differs. vLLM also counts draft tokens behind the end of an answer: if it is one token, two
of three are there. Only OCR and captions have longer answers.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.machine import measured_on
from benchmarks.quality.evaluate import OPTIONS, Answer, Sample, answers, layers, positive
from benchmarks.quality.model import CHECKPOINT, LAYERS, normalised
from benchmarks.quality.packing import IGNORE, Batch, Packer
from benchmarks.quality.tasks import TASKS, samples
from benchmarks.quality.train import learning_rate

DRAFTS = 3
ROWS, BATCHES, EPOCHS, RATE = 8, 64, 8, 2e-3
COUNTED = ("drafts", "draft_tokens", "accepted_tokens")


class Head(nn.Module):
    """An EAGLE head of one layer. Its parameters have the names under which vLLM loads them."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        config = model.config.text_config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, layer_idx=0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.of_model = (model.model.language_model,)  # In a tuple, its parameters are not the head's.

    def forward(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """What the head takes for the model's states of all tokens but the first.

        Args:
            batch: The tokens.
            states: The model's final states of all tokens but the last, normalised, shape
                `(rows, tokens - 1, hidden)`, as the result.
        """
        (text,) = self.of_model
        hidden = self.fc(torch.cat([text.embed_tokens(batch.ids[:, 1:]), states], -1))
        rotary = text.rotary_emb(hidden, batch.positions[:, :-1])
        mask = batch.mask()[..., :-1, :-1]
        out: torch.Tensor = self.layers[0](hidden, attention_mask=mask, position_embeddings=rotary)
        return out

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the head to a folder, and returns its `--speculative-config`."""
        save_file(self.state_dict(), folder / "model.safetensors")
        text = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]
        text |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(text))
        return {"method": "eagle", "model": str(folder), "num_speculative_tokens": DRAFTS}


@torch.no_grad()
def final_states(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The model's final states of a batch, normalised, shape `(rows, tokens, hidden)`."""
    states: torch.Tensor = model.model(
        input_ids=batch.ids,
        pixel_values=normalised(batch.pixels),
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return states


def loss(head: Head, lm_head: nn.Module, batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """How far the head's states and next tokens are from the model's, in answers behind the first token.

    In the second of two passes, the head reads its own states at random tokens in place of the model's, as it
    does behind its first draft.
    """
    answered = batch.targets != IGNORE
    drafted = answered[:, :-1] & answered[:, 1:]
    wanted, weights = states[:, 1:][drafted], batch.weights[:, 1:][drafted]
    seen, total = states[:, :-1], torch.zeros(())
    for _ in range(2):
        out = head(batch, seen)
        tokens = cross_entropy(lm_head(out[drafted]), lm_head(wanted).softmax(-1), reduction="none")
        apart = smooth_l1_loss(out[drafted], wanted, reduction="none").mean(-1)
        total = total + (tokens + apart) @ weights / weights.sum()
        own = drafted[:, :-1] & (torch.rand(drafted[:, 1:].shape) < 0.5)
        seen = torch.cat([seen[:, :1], torch.where(own[..., None], out[:, :-1], seen[:, 1:])], 1)
    return total


def trained(model: LlavaForConditionalGeneration) -> Head:
    """Trains a head for a model."""
    torch.manual_seed(0)
    head, packer = Head(model), Packer("validation", AutoTokenizer.from_pretrained(CHECKPOINT))
    batches = tqdm(islice(packer.batches(ROWS), BATCHES), "states", BATCHES, mininterval=5)
    data = [(batch, final_states(model, batch)) for batch in batches]
    optimizer = torch.optim.AdamW(head.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    rate = partial(learning_rate, steps=EPOCHS * BATCHES)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in tqdm(range(EPOCHS), "epochs"):
        for number in torch.randperm(BATCHES).tolist():
            optimizer.zero_grad()
            loss(head, model.lm_head, *data[number]).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return head


def served(
    asked: Mapping[str, Sequence[Sample]], layer: int | None, speculative: dict[str, Any] | None
) -> tuple[list[Answer], dict[str, dict[str, int]]]:
    """The answers of an engine, and by task what vLLM counts of its drafts. Stock vLLM has no `layer`."""
    from vllm import LLM

    more: dict[str, Any] = {"speculative_config": speculative, "disable_log_stats": False}
    if layer is not None:
        more |= {"model_impl": "vtw", "additional_config": {"vtw": {"layer": layer, "align": False}}}
    llm = LLM(str(CHECKPOINT), **OPTIONS, **more)
    given, counts, before = [], {}, dict.fromkeys(COUNTED, 0)
    for task, of_task in asked.items():
        given += answers(llm, of_task)
        if speculative:
            metrics = {metric.name: metric for metric in llm.get_metrics()}
            now = {name: metrics[f"vllm:spec_decode_num_{name}"].value for name in COUNTED}
            counts[task], before = {name: now[name] - before[name] for name in COUNTED}, now
    if speculative:
        counts["all"] = before
    return given, counts


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the percentage of draft tokens that were accepted."""
    head = ["", *TASKS, "all", "accepted per draft", "answers as without drafts"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        cells = [f"{100 * share:.1f}" for share in row["accepted_share"].values()]
        cells += [f"{row['accepted_per_draft']['all']:.2f}", f"{row['equal_answers']} of {row['answers']}"]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # Each engine has a process of its own already.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=layers, default=f"{LAYERS},9,6", help="values of K, besides stock")
    parser.add_argument("--samples", type=positive, default=200, help="of each task, of the test split")
    parser.add_argument("--out", type=Path, help="results as JSON, with a table beside it")
    options = parser.parse_args()
    asked = {task: list(islice(samples("test", task), options.samples)) for task in TASKS}
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    head = trained(model.eval().requires_grad_(False))
    training = {"rows": ROWS * BATCHES, "epochs": EPOCHS, "seconds": round(time.monotonic() - started, 1)}
    fresh = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as engines:
        speculative = head.save(Path(folder))
        for layer in (None, *options.layers):
            given, counts = engines.submit(served, asked, layer, speculative).result()
            plain, _ = engines.submit(served, asked, layer, None).result()
            row = {
                "name": f"K = {layer}" if layer else "stock",
                "accepted_share": {t: n["accepted_tokens"] / n["draft_tokens"] for t, n in counts.items()},
                "accepted_per_draft": {t: n["accepted_tokens"] / n["drafts"] for t, n in counts.items()},
                "counts": counts,
                "answers": len(given),
                "equal_answers": sum(a.said == b.said for a, b in zip(given, plain, strict=True)),
            }
            rows.append(row)
            print(f"\n{table(rows)}\n", flush=True)
    if options.out:
        setup = {"samples_per_task": options.samples, "drafts": DRAFTS, "options": OPTIONS | {"align": False}}
        report = measured_on() | {"training": training} | setup | {"rows": rows}
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(rows) + "\n")
    if any(row["equal_answers"] < row["answers"] for row in rows):
        sys.exit("answers with drafts differ from those without")


if __name__ == "__main__":
    main()
