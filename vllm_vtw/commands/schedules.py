# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw gsearch` and `vtw psigmoid`: search a schedule of a few stages on a user's own data."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vtw.commands.results import save_results
from vllm_vtw.commands.search_setup import (
    SearchSetup,
    add_budget,
    add_options,
    collect_samples,
    count,
    exit_on_failure,
    require_samples,
    share,
)
from vllm_vtw.policy import BY_IMAGE, BY_QUESTION, Policy

if TYPE_CHECKING:
    from vllm_vtw.search.data.sample import Sample, Skipped
    from vllm_vtw.search.divergence import TaskDivergence
    from vllm_vtw.search.model import HFModel
    from vllm_vtw.search.price import Price, RequestTokens
    from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer


@dataclass
class FullAnswers:
    """The full model's answers to all samples.

    Attributes:
        samples: The samples, as layer 0 gets them.
        sources: The same samples, as the data has them.
        request: The tokens of a sample, as a mean over all samples.
        digest: SHA-256 of everything that the model got.
        tasks: By task, the number of samples, of answer tokens, and of answers that were cut.
        skipped: The lines that report bad samples.
    """

    samples: "list[SampleAtLayer]"
    sources: "list[Sample]"
    request: "RequestTokens"
    digest: str
    tasks: dict[str, dict[str, int]]
    skipped: list[str]

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same if the search is resumed."""
        return {"samples": len(self.samples), "samples_sha256": self.digest}


@dataclass(frozen=True)
class SearchResult:
    """A searched schedule.

    Attributes:
        keeps: The fraction of visual tokens of each layer, before layers were merged into stages.
        policy: The stages. There are none if nothing can be withdrawn.
        settings: How it was searched, besides the settings that all searches have.
    """

    keeps: Sequence[float]
    policy: Policy
    settings: dict[str, Any] = field(default_factory=dict)


Search = Callable[["HFModel", FullAnswers, "Price"], SearchResult]
Prepare = Callable[[argparse.Namespace, dict[str, Any], int], Search]
"""Returns a search, given the command's options, the settings that a resumed search has to share, and the
first layer that may get fewer visual tokens. It refuses wrong options before the model is loaded."""


def add_command(commands: Any) -> None:
    """Adds `gsearch` and `psigmoid` to the `vtw` command."""
    gsearch = commands.add_parser(
        "gsearch",
        help="find the fewest visual tokens that each layer needs, on your data",
        description="G-Search: finds how few visual tokens each layer needs, from shallow to deep layers.",
    )
    _add_options(gsearch, "vtw-gsearch", _g_search)
    add_budget(gsearch.add_argument)

    psigmoid = commands.add_parser(
        "psigmoid",
        help="find the best schedule of visual tokens for a budget, on your data",
        description="P-Sigmoid: finds the schedule within a budget that changes answers least.",
    )
    _add_options(psigmoid, "vtw-psigmoid", _p_sigmoid)
    budget = psigmoid.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--budget", type=share, help="budget: the fraction of the full decoder's work on a prompt"
    )
    budget.add_argument("--kv-budget", type=share, help="budget: the fraction of stock vLLM's KV memory")
    psigmoid.add_argument(
        "--trials", type=count, default=60, help="number of schedules to try (default: %(default)s)"
    )


def _add_options(parser: argparse.ArgumentParser, out: str, prepare: Prepare) -> None:
    add_options(parser.add_argument, out, samples=64)
    parser.add_argument(
        "--ranking",
        choices=BY_QUESTION + BY_IMAGE,
        default=BY_QUESTION[0],
        help=f"what visual tokens are ranked by; {', '.join(BY_IMAGE)} may withdraw them before layer 0 "
        "(default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the search in --out")
    parser.add_argument(
        "--max-stages",
        type=count,
        default=4,
        help="maximum number of stages, runs of layers with the same tokens, stage 0 included; each takes "
        "one or more KV-cache groups (default: %(default)s)",
    )
    parser.set_defaults(parser=parser, run=partial(_run, prepare))


def _run(prepare: Prepare, arguments: argparse.Namespace) -> None:
    parser = arguments.parser
    method = parser.prog.split()[-1]
    stopped = (
        "run the same command with --resume to continue with the layers or trials that are in "
        f"{arguments.out}. The model then answers again first."
    )
    with exit_on_failure(parser, stopped):
        from vllm_vtw.search.reports import schedules as schedule_report

        result, policy = _search(method, arguments, prepare)
    search = {key: result[key] for key in ("method", "made", "keeps")}
    content = policy.to_json(result["model"]) | {"search": search} if policy.stages else None
    save_results(arguments, result, content, schedule_report.html, schedule_report.table(result))


def _search(method: str, arguments: argparse.Namespace, prepare: Prepare) -> tuple[dict[str, Any], Policy]:
    """Runs a search. Returns the content of `result.json`, and the policy."""
    from vllm_vtw.search.model import HFModel
    from vllm_vtw.search.price import Price
    from vllm_vtw.search.reports.schedules import notes
    from vllm_vtw.search.schedules.comparison import Comparison
    from vllm_vtw.search.schedules.schedule import FIRST_RANKED_LAYER

    setup = SearchSetup.of(arguments)
    num_layers, ranking = setup.shape.num_hidden_layers, arguments.ranking
    if arguments.max_stages < 2 and ranking in BY_QUESTION:
        raise ValueError("--max-stages 1: has to be at least 2, as the first layers get all visual tokens")
    setup.settings["ranking"] = ranking
    first_layer = max(FIRST_RANKED_LAYER, setup.shape.first_layer)
    if ranking in BY_IMAGE:
        first_layer = setup.shape.first_layer if setup.shape.first_layer > 1 else 0
    search = prepare(arguments, setup.settings, first_layer)
    model = HFModel(arguments.model, setup.config, setup.placement)
    answers = _full_answers(model, setup, arguments)
    price = Price(num_layers, model.layer_parameters, model.attention_width, answers.request)
    found = search(model, answers, price)
    found = replace(found, policy=replace(found.policy, ranked_by=ranking))

    by_memory = method == "psigmoid" and arguments.kv_budget is not None
    compare = Comparison(
        model,
        answers.sources,
        price,
        price.kv_share if by_memory else price.flops_share,
        setup.shape.first_layer,
        arguments.max_tokens,
    )
    result: dict[str, Any] = {
        "method": method,
        "model": setup.shape.as_dict(),
        "made": {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            **setup.settings,
            **answers.identity,
            **found.settings,
        },
        "tasks": answers.tasks,
        "tokens_per_request": asdict(answers.request),
        "keeps": found.keeps,
        "others_take_no_more": "KV memory" if by_memory else "work",
        "policies": compare.of(method, found.policy, answers.samples),
        "skipped": answers.skipped,
    }
    result["notes"] = notes(result, setup.tasks - answers.tasks.keys()) + model.prompts.notes
    return result, found.policy


def _full_answers(model: "HFModel", setup: SearchSetup, arguments: argparse.Namespace) -> FullAnswers:
    """Has the full model answer up to `--limit` samples."""
    from vllm_vtw.search.data.random_order import draw_samples
    from vllm_vtw.search.data.sample import BadSampleError, Skipped
    from vllm_vtw.search.price import RequestTokens
    from vllm_vtw.search.resume import inputs_digest
    from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer

    order = draw_samples(setup.data.samples, arguments.seed)
    sources: list[Sample] = []
    tasks: dict[str, dict[str, int]] = {}
    text = output = 0
    digest = hashlib.sha256()

    def answer() -> "Iterator[Skipped | SampleAtLayer]":
        nonlocal text, output
        good = 0
        for sample in order:
            if good == arguments.limit:
                return
            try:
                inputs = model.encode(sample, arguments.max_tokens)
                model.prompts.check_ranking(inputs, arguments.ranking)
            except BadSampleError as error:
                yield Skipped(sample.where, error)
                continue
            good += 1
            answered = model.answer(inputs, arguments.max_tokens)
            digest.update(inputs_digest(inputs).encode())
            text += answered.text_tokens
            output += len(answered.tokens)
            counts = tasks.setdefault(sample.task, {"samples": 0, "tokens": 0, "cut": 0})
            counts["samples"] += 1
            counts["tokens"] += len(answered.tokens)
            counts["cut"] += answered.cut
            sources.append(sample)
            yield SampleAtLayer.of(model, sample.task, answered, arguments.ranking)

    skipped = setup.skipped
    samples = collect_samples(answer(), min(arguments.limit, len(order)), "answering", skipped)
    require_samples(len(samples), arguments.data)
    visual = sum(sample.rows.visual_tokens for sample in samples)
    request = RequestTokens(visual / len(samples), text / len(samples), output / len(samples))
    return FullAnswers(samples, sources, request, digest.hexdigest(), dict(sorted(tasks.items())), skipped)


def _g_search(arguments: argparse.Namespace, settings: dict[str, Any], first_layer: int) -> Search:
    from tqdm import tqdm

    from vllm_vtw.search.journal import Journal
    from vllm_vtw.search.schedules.gsearch import g_search, search_stages
    from vllm_vtw.search.schedules.schedule import GRID

    budget = {name: getattr(arguments, name) for name in ("max_answer_kl", "max_token_change")}
    searched_with = budget | {"grid": GRID}
    journal = Journal(arguments.out / "gsearch.jsonl", "G-Search", settings | searched_with, arguments.resume)

    def within(curves: "Mapping[str, TaskDivergence]") -> bool:
        return all(curve.within(*budget.values()) for curve in curves.values())

    def search(model: "HFModel", answers: FullAnswers, price: "Price") -> SearchResult:
        journal.begin(answers.identity)
        # The first item of `found` says which samples the search uses.
        earlier = [line["keep"] for line in journal.found[1:]]
        keeps = list(earlier)
        borders = range(first_layer, price.num_layers)
        with tqdm(total=price.num_layers, initial=len(earlier), unit="layer", desc="searching") as bar:
            for keep in g_search(model, answers.samples, within, borders, earlier):
                journal.add({"layer": len(keeps), "keep": keep})
                keeps.append(keep)
                bar.update()
        policy = search_stages(model, answers.samples, within, keeps, arguments.max_stages, price)
        return SearchResult(keeps, policy, searched_with | {"max_stages": arguments.max_stages})

    return search


def _p_sigmoid(arguments: argparse.Namespace, settings: dict[str, Any], first_layer: int) -> Search:
    from tqdm import tqdm

    from vllm_vtw.search.journal import Journal
    from vllm_vtw.search.schedules.psigmoid import affordable, cheapest, p_sigmoid
    from vllm_vtw.search.schedules.sample_at_layer import divergence_by_task
    from vllm_vtw.search.schedules.schedule import keeps_by_layer

    searched_with = {name: getattr(arguments, name) for name in ("budget", "kv_budget", "max_stages")}
    by_memory, max_stages = arguments.kv_budget is not None, arguments.max_stages
    option, budget = ("--kv-budget", arguments.kv_budget) if by_memory else ("--budget", arguments.budget)
    journal = Journal(
        arguments.out / "psigmoid.jsonl", "P-Sigmoid", settings | searched_with, arguments.resume
    )
    storage: Path = arguments.out / "optuna.journal"

    def search(model: "HFModel", answers: FullAnswers, price: "Price") -> SearchResult:
        if by_memory:
            # Stages are chosen by the KV memory that they take. Their work counts a thousandth of that.
            price = replace(price, work_weight=1e-3)
        limited_share = price.kv_share if by_memory else price.flops_share
        least = limited_share(cheapest(first_layer, max_stages, price))
        if least > budget:
            raise ValueError(
                f"{option} {budget:g}: on this data, no schedule takes less than {least:.3f}: allow more"
            )
        if not journal.found:
            storage.unlink(missing_ok=True)
        journal.begin(answers.identity)
        with tqdm(total=arguments.trials, unit="schedule", desc="searching") as bar:
            best, trials = p_sigmoid(
                lambda k, m: affordable(k, m, first_layer, max_stages, price, limited_share, budget),
                lambda policy: divergence_by_task(
                    model, answers.samples, 0, keeps_by_layer(policy, price.num_layers)
                ),
                price.num_layers,
                arguments.trials,
                arguments.seed,
                storage,
                lambda complete: bar.update(complete - bar.n),
            )
        sigmoid = {name: getattr(best, name) for name in ("k", "m", "r_max")}
        return SearchResult(best.keeps, best.policy, searched_with | {"trials": trials} | sigmoid)

    return search
