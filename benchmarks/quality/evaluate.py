# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what withdrawal costs in answers: the accuracy of each task in stock vLLM and at several K.

    python -m benchmarks.quality.evaluate [--checkpoint FOLDER] [--layers 12,9,6,3] [--samples 200]
        [--check] [--out FILE.json]

`"align"` is false, so every visual token is withdrawn, as in the paper (VTW, arXiv 2405.05803). With
`--check`, the transformers reference answers the same questions, and the benchmark fails if an answer of the
engine differs from it by more than a tie.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.machine import measured_on
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS, PICTURE_PART, question_part
from benchmarks.quality.plots import plot_layers
from benchmarks.quality.tasks import TASKS, Question, objects_found, samples

if TYPE_CHECKING:
    from vllm import LLM

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
TIE = 1e-3
"""If the logits of two tokens are closer than this, it depends on rounding which token is chosen."""
Sample = tuple[Image.Image, Question]


@dataclass
class Answer:
    """The answer to a sample.

    Attributes:
        text: The answer.
        prompt: The token ids of the prompt.
        said: The token ids of the answer.
    """

    text: str
    prompt: list[int]
    said: list[int]


@dataclass
class Score:
    """The accuracy of answers.

    Attributes:
        right: The fraction of answers that are right to the letter, by task.
        objects: `objects_found`, as a mean over captions.
    """

    right: dict[str, float]
    objects: float


@dataclass
class Check:
    """How the transformers reference answers the same samples.

    Attributes:
        reference: The score of its answers.
        differing: The number of the engine's answers that differ from its own.
        largest_gap: At the first token where answers differ, the largest number of logits by which the
            reference prefers its own token.
    """

    reference: Score
    differing: int
    largest_gap: float


@dataclass
class Result:
    """The result of one engine.

    Attributes:
        layer: K. The number of layers for stock vLLM.
        engine: The score of the engine's answers.
        seconds: How long it took, the start of the engine included.
        check: The comparison with the reference. None without `--check`.
    """

    layer: int
    engine: Score
    seconds: float
    check: Check | None = None


def answers(llm: "LLM", asked: Sequence[Sample]) -> list[Answer]:
    """The answers of an engine, with greedy decoding."""
    from vllm import SamplingParams

    prompts = [
        {"prompt": PICTURE_PART + question_part(question.text), "multi_modal_data": {"image": picture}}
        for picture, question in asked
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS))
    return [
        Answer(
            output.outputs[0].text.strip(), list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        )
        for output in outputs
    ]


def engine_answers(checkpoint: Path, vtw: dict[str, Any] | None, asked: Sequence[Sample]) -> list[Answer]:
    """Starts an engine, and returns its answers.

    Args:
        checkpoint: The folder of the model.
        vtw: The plugin's options. None for stock vLLM.
        asked: The images and questions.
    """
    from vllm import LLM

    plugin: dict[str, Any] = {}
    if vtw is not None:
        plugin = {"model_impl": "vtw", "additional_config": {"vtw": vtw}}
    llm = LLM(model=str(checkpoint), **OPTIONS, **plugin)
    try:
        return answers(llm, asked)
    finally:
        llm.llm_engine.engine_core.shutdown()


def score(asked: Sequence[Sample], given: Sequence[Answer]) -> Score:
    """The accuracy of answers to samples."""
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
    """The reference's own answer to a sample.

    The reference reads the whole of `answer` in one forward pass. It decodes token by token only after the
    first token that it would have chosen differently.

    Args:
        oracle: The reference.
        layer: K.
        picture: The image.
        answer: The engine's answer.

    Returns:
        The tokens of the reference's answer, and by how many logits it prefers its own token at the first
        token that differs. The latter is 0 if the answers are the same.
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
    while said[-1] != oracle.processor.tokenizer.eos_token_id and len(said) < MAX_ANSWER_TOKENS:
        said.append(int(logits(said)[-1].argmax()))
    return said, gap


def check(oracle: "Reference", layer: int, asked: Sequence[Sample], given: Sequence[Answer]) -> Check:
    """Compares the engine's answers with the reference's, which decodes greedily.

    Args:
        oracle: The reference.
        layer: K.
        asked: The images and questions.
        given: The engine's answers.
    """
    own, gaps = [], []
    pairs = tqdm(
        zip(asked, given, strict=True), total=len(asked), desc=f"reference, K = {layer}", mininterval=5
    )
    for (picture, _), answer in pairs:
        said, gap = own_answer(oracle, layer, picture, answer)
        text = oracle.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        own.append(Answer(text, answer.prompt, said))
        gaps.append(gap)
    return Check(score(asked, own), sum(a.said != b.said for a, b in zip(own, given, strict=True)), max(gaps))


def guessing(asked: Sequence[Sample]) -> Score:
    """The score if every question gets the most common answer of its task, whatever the image shows."""
    commonest = {
        task: Counter(q.answer for _, q in asked if q.task == task).most_common(1)[0][0] for task in TASKS
    }
    return score(asked, [Answer(commonest[q.task], [], []) for _, q in asked])


def percent(found: Score) -> list[str]:
    """The cells of a table's row: the accuracies of a score in percent."""
    return [f"{100 * share:.1f}" for share in (*found.right.values(), found.objects)]


def table(results: Sequence[Result], guess: Score) -> str:
    """A Markdown table of accuracies in percent, with a row for each engine and one for guessing."""
    head = ["", *TASKS, "caption, objects"]
    rows = []
    for result in results:
        name = f"K = {result.layer}" if result.layer < LAYERS else "stock"
        rows.append([name, *percent(result.engine)])
        if result.check:
            rows.append([f"{name}, reference", *percent(result.check.reference)])
    rows.append(["always the commonest answer", *percent(guess)])
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def layers(text: str) -> list[int]:
    """Parses values of K such as `"12,6"`, as an argparse type. Returns them in descending order."""
    wanted = text.split(",")
    if not all(layer.isdecimal() and 1 <= int(layer) <= LAYERS for layer in wanted):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 12,6 of numbers from 1 to {LAYERS}")
    return sorted(set(map(int, wanted)), reverse=True)


def positive(text: str) -> int:
    """Parses a whole number of at least 1, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument(
        "--layers", type=layers, default=f"{LAYERS},9,6,3", help=f"values of K; {LAYERS} is stock vLLM"
    )
    parser.add_argument("--samples", type=positive, default=200, help="of each task")
    parser.add_argument("--check", action="store_true", help="have the transformers reference answer, too")
    parser.add_argument("--out", type=Path, help="results as JSON, with a table and a plot beside it")
    options = parser.parse_args()
    weights = options.checkpoint / "model.safetensors"
    for file in (weights, options.checkpoint / "config.json"):
        if not file.is_file():
            parser.error(f"--checkpoint {options.checkpoint}: no {file.name} there")
    if options.out and options.out.suffix != ".json":
        parser.error(f"--out {options.out}: has to end in .json")
    if options.out and not os.access(options.out.parent, os.W_OK):
        parser.error(f"--out {options.out}: cannot write to folder {options.out.parent}")
    asked = [sample for task in TASKS for sample in islice(samples("test", task), options.samples)]
    report = measured_on() | {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "samples_per_task": options.samples,
        "options": OPTIONS | {"align": False},
        "guessing": asdict(guessing(asked)),
    }
    results: list[Result] = []
    for layer in options.layers:
        print(f"K = {layer} of {LAYERS}", flush=True)
        started = time.monotonic()
        vtw = {"layer": layer, "align": False} if layer < LAYERS else None
        given = engine_answers(options.checkpoint, vtw, asked)
        results.append(Result(layer, score(asked, given), round(time.monotonic() - started, 1)))
        if options.check:
            from tests.engine.reference import Reference

            results[-1].check = check(Reference(options.checkpoint), layer, asked, given)
        shown = table(results, guessing(asked))
        print(f"\n{shown}\n", flush=True)
        if options.out:
            report["results"] = [asdict(result) for result in results]
            options.out.write_text(json.dumps(report, indent=2) + "\n")
            options.out.with_suffix(".md").write_text(shown + "\n")
            plot_layers({r.layer: r.engine.right for r in results}, options.out.with_suffix(".png"))
    parted = [str(r.layer) for r in results if r.check and r.check.largest_gap > TIE]
    if parted:
        sys.exit(f"the engine parts from the reference by more than {TIE} logits at K = {', '.join(parted)}")


if __name__ == "__main__":
    main()
