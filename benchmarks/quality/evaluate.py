"""What withdrawal costs in answers: accuracy by task, stock and withdrawn after layer K.

    python -m benchmarks.quality.evaluate [--checkpoint FOLDER] [--layers 3,6,9,12] [--samples 200]
        [--split test] [--check] [--out FILE]

`align` is off, so that every visual token leaves, as in the paper (VTW, arXiv 2405.05803). `--check` has the
transformers reference answer the same.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.machine import measured_on
from benchmarks.quality.model import CHECKPOINT, LAYERS, PICTURE_PART, question_part
from benchmarks.quality.plots import plot_layers
from benchmarks.quality.tasks import TASKS, Question, objects_found, samples

if TYPE_CHECKING:
    from tests.engine.reference import Reference

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
    """What was said to a sample, with the tokens of both."""

    text: str
    prompt: list[int]
    said: list[int]


@dataclass
class Score:
    """By task the share of answers that are right to the letter, and `objects_found`, mean over captions."""

    right: dict[str, float]
    objects: float


@dataclass
class Result:
    """One engine's.

    Attributes:
        layer: K; the number of layers stands for stock.
        seconds: of the engine, its start included.
        reference: with `--check`, what the transformers reference scores on the same samples.
        differing: with `--check`, how many of the engine's answers are not the reference's.
        widest_tie: the most, in logits, by which the reference prefers its own token where the two part.
    """

    layer: int
    engine: Score
    seconds: float
    reference: Score | None = None
    differing: int | None = None
    widest_tie: float | None = None


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
            output.outputs[0].text.strip(), list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        )
        for output in outputs
    ]


def score(asked: Sequence[Sample], given: Sequence[Answer]) -> Score:
    right, objects = {}, 0.0
    for task in TASKS:
        of_task = [(q.answer, a.text) for (_, q), a in zip(asked, given, strict=True) if q.task == task]
        right[task] = sum(wanted == said for wanted, said in of_task) / len(of_task)
        if task == "caption":
            objects = sum(objects_found(*pair) for pair in of_task) / len(of_task)
    return Score(right, objects)


def own_answer(
    oracle: "Reference", layer: int, picture: Image.Image, answer: Answer
) -> tuple[list[int], float]:
    """The tokens that the reference says, and by how many logits it prefers the first that `answer` has not.

    It looks at all of `answer` at once, and goes on by itself only where it parts from it.
    """
    embeds, start = [oracle.embeds(picture)], len(answer.prompt)

    def logits(said: list[int]) -> torch.Tensor:
        ids = answer.prompt + said
        return oracle.logits(ids, embeds, layer, oracle.dropped(ids, start, block_size=1))[start - 1 :]

    found = logits(answer.said)[:-1]
    own = found.argmax(-1).tolist()
    if own == answer.said:
        return own, 0.0
    parting = next(at for at, token in enumerate(answer.said) if own[at] != token)
    gap = (found[parting].max() - found[parting, answer.said[parting]]).item()
    said = own[: parting + 1]
    while said[-1] != oracle.processor.tokenizer.eos_token_id and len(said) < LONGEST:
        said.append(int(logits(said)[-1].argmax()))
    return said, gap


def check(checkpoint: Path, asked: Sequence[Sample], given: Sequence[Answer], result: Result) -> None:
    """Fills `result` with what greedy decoding by the transformers reference gives."""
    from tests.engine.reference import Reference

    oracle = Reference(checkpoint)
    answers, gaps = [], []
    pairs = tqdm(zip(asked, given, strict=True), total=len(asked), desc=f"reference, K = {result.layer}")
    for (picture, _), answer in pairs:
        said, gap = own_answer(oracle, result.layer, picture, answer)
        text = oracle.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        answers.append(Answer(text, answer.prompt, said))
        gaps.append(gap)
    result.reference = score(asked, answers)
    result.differing = sum(a.said != b.said for a, b in zip(answers, given, strict=True))
    result.widest_tie = max(gaps)


def table(results: Sequence[Result]) -> str:
    """In Markdown, one line for each engine."""
    lines = [
        "| | " + " | ".join(TASKS) + " | caption, objects |",
        "| --- |" + " ---: |" * (len(TASKS) + 1),
    ]
    for result in results:
        name = "stock" if result.layer == LAYERS else f"K = {result.layer}"
        shares = [*result.engine.right.values(), result.engine.objects]
        lines.append(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--layers", default=f"3,6,9,{LAYERS}", help=f"values of K; {LAYERS} is stock vLLM")
    parser.add_argument("--samples", type=int, default=200, help="of each task")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--check", action="store_true", help="have the transformers reference answer, too")
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
    results = []
    for layer in layers:
        started = time.monotonic()
        given = answers(options.checkpoint, layer, asked)
        results.append(Result(layer, score(asked, given), round(time.monotonic() - started, 1)))
        if options.check:
            check(options.checkpoint, asked, given, results[-1])
        print(f"\n{table(results)}\n", flush=True)
    if options.out:
        report = measured_on() | {
            "split": options.split,
            "samples_per_task": options.samples,
            "options": OPTIONS | {"align": False},
            "results": [asdict(result) for result in results],
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        upwards = results[::-1]
        plot_layers(
            [result.layer for result in upwards],
            [result.engine.right for result in upwards],
            options.out.with_suffix(".png"),
        )


if __name__ == "__main__":
    main()
