# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what the search for K costs in processor time: the plain search, and that of `vtw calibrate`.

    python -m benchmarks.calibration_cost [--out FILE.json]

The plain search runs the whole model again for every K, as published. `vtw calibrate` runs it once, and then
only the rows of the text for every K. The lengths and the number of layers are those of LLaVA-1.5: 576 visual
and 69 text tokens through 32 layers, with K from 5 to 31. The model is narrower and has random weights. In
both searches, the vision tower runs once for each sample.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import measured_on
from benchmarks.small_llava import SmallLlava
from tests.search.plain import dropping
from vllm_vtw.search.checkpoint import read_config
from vllm_vtw.search.data.prompts import ModelInputs
from vllm_vtw.search.data.sample import Sample
from vllm_vtw.search.divergence import AnswerDivergence
from vllm_vtw.search.model import HFModel, Placement

MODEL = SmallLlava(layers=32, hidden=512, heads=8, kv_heads=8, image_side=24, vocab=512)
LAYERS = range(5, 32)
PROMPT = "<image>\n" + "Tell me about mountains, clouds. " * 6
ANSWER = 64
SAMPLES = 3


@torch.inference_mode()
def plain(llava: HFModel, inputs: Any) -> list[float]:
    """KL(withdrawn || full) of the first token for every K, in nats. It runs the model again for each K."""
    ids = inputs["input_ids"]
    kept = ids[0] != llava.config.image_token_index
    kept[-1] = True
    embeds = llava.hf_model.get_input_embeddings()(ids)
    pictures = llava.hf_model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    embeds[:, ids[0] == llava.config.image_token_index] = pictures[0]

    def last() -> torch.Tensor:
        states = llava.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return llava.hf_model.lm_head(states[0, -1:])

    full, found = last(), []
    for layer in LAYERS:
        with dropping(llava.decoder.layers, layer, kept):
            found.append(AnswerDivergence.between(full, last()).first_token_kl)
    return found


def ours(llava: HFModel, inputs: ModelInputs, answer_tokens: int) -> list[float]:
    """The same as `plain`, as `vtw calibrate` computes it for answers of at most `answer_tokens` tokens."""
    answered = llava.answer(inputs, answer_tokens)
    rows = llava.withdrawn_logits(answered, LAYERS)
    return [AnswerDivergence.between(answered.logits, row).first_token_kl for row in rows]


def seconds(run: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Runs a search. Returns its processor time on all cores together, in seconds, and its result.

    Processor time does not include the work of other processes on the machine.
    """
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="results as JSON")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        name = str(MODEL.save(Path(folder)))
        config = read_config(name)
        llava = HFModel(name, config, Placement.of("cpu", "float32", config))
        side = MODEL.image_side * 14
        Image.effect_noise((side, side), 80).convert("RGB").save(f"{folder}/noise.png")
        encoded = llava.encode(Sample("", ("noise.png",), PROMPT, folder=Path(folder)), ANSWER)
    inputs = encoded.tensors
    lengths = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == llava.config.image_token_index).sum())
    searches: dict[str, Callable[[], list[float]]] = {
        "plain": lambda: plain(llava, inputs),
        "first token": lambda: ours(llava, encoded, 1),
        "whole answer": lambda: ours(llava, encoded, ANSWER),
    }
    for run in searches.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in searches}
    kls: list[list[float]] = []
    for number in range(2 * SAMPLES):
        found = {}
        for name in list(searches)[:: 1 if number % 2 == 0 else -1]:
            spent, found[name] = seconds(searches[name])
            taken[name].append(round(spent, 2))
            print(f"{name}: {spent:.2f} s", flush=True)
        kls.extend(found.values())
    means = {name: sum(times) / len(times) for name, times in taken.items()}
    report = measured_on() | {
        "tokens": {"visual": visual, "text": lengths - visual, "answer": ANSWER},
        "layers": [LAYERS.start, LAYERS.stop - 1],
        "processor_seconds_per_sample": taken,
        "plain_over_first_token": round(means["plain"] / means["first token"], 2),
        "plain_over_whole_answer": round(means["plain"] / means["whole answer"], 2),
        "first_token_kl": {
            "smallest": min(map(min, kls)),
            "largest": max(map(max, kls)),
            "largest_difference": max(max(of_layer) - min(of_layer) for of_layer in zip(*kls, strict=True)),
        },
    }
    text = json.dumps(report, indent=2, allow_nan=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
