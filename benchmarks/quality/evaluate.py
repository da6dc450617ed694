"""What withdrawal costs in answers: accuracy by task, stock and withdrawn after layer K.

    python -m benchmarks.quality.evaluate [--checkpoint FOLDER] [--layers 3,6,9,12] [--samples 200]
        [--split test] [--check] [--out FILE]

`align` is off, so that every visual token leaves, as in the paper (VTW, arXiv 2405.05803). `--check` compares
every answer with the one that the transformers reference gives.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from benchmarks.machine import measured_on
from benchmarks.quality.model import CHECKPOINT, LAYERS, PICTURE_PART, question_part
from benchmarks.quality.plots import plot_layers
from benchmarks.quality.tasks import TASKS, Question, objects_found, samples

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "kv_cache_memory_bytes": 512 << 20,
    "max_model_len": 256,
    "max_num_seqs": 64,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 1},
}
LONGEST = 40
Sample = tuple[Image.Image, Question]


@dataclass
class Answer:
    """What was said to a sample; `ids` are the tokens of prompt and answer."""

    text: str
    ids: list[int]
    num_prompt_tokens: int


@dataclass
class Score:
    """One engine's share of right answers, by task.

    Attributes:
        layer: K; the number of layers stands for stock.
        right: by task, answers that are right to the letter.
        objects: `objects_found`, mean over captions.
        differing: with `--check`, how many answers the reference gives differently.
        seconds: of the engine, its start included.
    """

    layer: int
    right: dict[str, float] = field(default_factory=dict)
    objects: float = 0.0
    differing: int | None = None
    seconds: float = 0.0


def answers(checkpoint: Path, layer: int, asked: Sequence[Sample]) -> list[Answer]:
    """Greedy answers of an engine that withdraws after `layer`; stock vLLM where that is the last."""
    from vllm import LLM, SamplingParams

    vtw: dict[str, Any] = {}
    if layer < LAYERS:
        vtw = {"model_impl": "vtw", "additional_config": {"vtw": {"layer": layer, "align": False}}}
    llm = LLM(model=str(checkpoint), **OPTIONS, **vtw)
    try:
        prompts = [
            {
                "prompt": PICTURE_PART + question_part(question.text),
                "multi_modal_data": {"image": picture},
            }
            for picture, question in asked
        ]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=LONGEST))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return [
        Answer(
            output.outputs[0].text.strip(),
            [*output.prompt_token_ids, *output.outputs[0].token_ids],
            len(output.prompt_token_ids),
        )
        for output in outputs
    ]


def score(layer: int, asked: Sequence[Sample], given: Sequence[Answer]) -> Score:
    result = Score(layer)
    for task in TASKS:
        of_task = [(q.answer, a.text) for (_, q), a in zip(asked, given, strict=True) if q.task == task]
        result.right[task] = sum(wanted == said for wanted, said in of_task) / len(of_task)
        if task == "caption":
            result.objects = sum(objects_found(*pair) for pair in of_task) / len(of_task)
    return result


def differing(checkpoint: Path, layer: int, asked: Sequence[Sample], given: Sequence[Answer]) -> int:
    """How many answers are not what greedy decoding by the transformers reference gives.

    An answer is the reference's own if each of its tokens is the reference's choice after those before it.
    """
    from tests.engine.reference import Reference

    oracle = Reference(checkpoint)
    count = 0
    for (picture, _), answer in tqdm(
        zip(asked, given, strict=True), total=len(asked), desc=f"reference, K = {layer}"
    ):
        dropped = oracle.dropped(answer.ids, answer.num_prompt_tokens, block_size=1)
        logits = oracle.logits(answer.ids, [oracle.embeds(picture)], layer, dropped)
        choices = logits[answer.num_prompt_tokens - 1 : -1].argmax(-1).tolist()
        count += choices != answer.ids[answer.num_prompt_tokens :]
    return count


def table(scores: Sequence[Score]) -> str:
    """In Markdown, one line for each engine."""
    lines = [
        "| | " + " | ".join(TASKS) + " | caption, objects |",
        "| --- |" + " ---: |" * (len(TASKS) + 1),
    ]
    for result in scores:
        name = "stock" if result.layer == LAYERS else f"K = {result.layer}"
        shares = [*result.right.values(), result.objects]
        lines.append(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--layers", default=f"3,6,9,{LAYERS}", help=f"values of K; {LAYERS} is stock vLLM")
    parser.add_argument("--samples", type=int, default=200, help="of each task")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--check", action="store_true", help="compare with the transformers reference")
    parser.add_argument("--out", type=Path, help="results as JSON, and a plot beside it")
    options = parser.parse_args()
    layers = sorted(map(int, options.layers.split(",")), reverse=True)
    if not options.checkpoint.is_dir():
        parser.error(
            f"--checkpoint {options.checkpoint}: no such folder; `make train` makes .training/checkpoint"
        )
    if not all(1 <= layer <= LAYERS for layer in layers):
        parser.error(f"--layers {options.layers}: the model has layers 1 to {LAYERS}")
    asked = [sample for task in TASKS for sample in islice(samples(options.split, task), options.samples)]
    scores = []
    for layer in layers:
        started = time.monotonic()
        given = answers(options.checkpoint, layer, asked)
        result = score(layer, asked, given)
        result.seconds = round(time.monotonic() - started, 1)
        if options.check:
            result.differing = differing(options.checkpoint, layer, asked, given)
        scores.append(result)
        print(f"\n{table(scores)}\n", flush=True)
    if options.out:
        report = measured_on() | {
            "split": options.split,
            "samples_per_task": options.samples,
            "options": OPTIONS | {"align": False},
            "scores": [asdict(result) for result in scores],
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        upwards = scores[::-1]
        plot_layers(
            [result.layer for result in upwards],
            [result.right for result in upwards],
            options.out.with_suffix(".png"),
        )


if __name__ == "__main__":
    main()
