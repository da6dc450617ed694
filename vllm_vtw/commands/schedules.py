"""`vtw gsearch` and `vtw psigmoid`: schedules of a few stages, searched on a user's own data."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vtw.commands.results import save_results
from vllm_vtw.commands.search_setup import (
    SearchSetup,
    add_budget,
    add_options,
    collect_samples,
    count,
    require_samples,
    share,
)
from vllm_vtw.policy import Policy

if TYPE_CHECKING:
    from vllm_vtw.search.data.sample import Skipped
    from vllm_vtw.search.divergence import Curve
    from vllm_vtw.search.model import HFModel
    from vllm_vtw.search.price import Price, RequestTokens
    from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer


@dataclass
class FullAnswers:
    """The full model's answers.

    Attributes:
        asked: The samples, before layer 0.
        request: A sample's tokens, mean over all.
        digest: Of what the model got.
        tasks: By task, how many samples and tokens, and how many answers were cut.
        skipped: Bad samples, and why.
    """

    asked: "list[SampleAtLayer]"
    request: "RequestTokens"
    digest: str
    tasks: dict[str, dict[str, int]]
    skipped: list[str]

    @property
    def samples(self) -> dict[str, Any]:
        """What has to be the same where a search is resumed."""
        return {"samples": len(self.asked), "samples_sha256": self.digest}


@dataclass(frozen=True)
class SearchResult:
    """A searched schedule.

    Attributes:
        keeps: The fraction of visual tokens of each layer, before they were merged into stages.
        policy: The stages; none where nothing was found.
        told: How it was searched, beside the settings that all searches have.
    """

    keeps: Sequence[float]
    policy: Policy
    told: dict[str, Any] = field(default_factory=dict)


Search = Callable[["HFModel", FullAnswers, "Price"], SearchResult]
Prepare = Callable[[argparse.Namespace, dict[str, Any]], Search]
"""Of options and the settings that what is resumed has to have been searched with: refuses before the model
is loaded."""


def add_command(commands: Any) -> None:
    """Adds `gsearch` and `psigmoid` to the `vtw` command."""
    gsearch = commands.add_parser(
        "gsearch",
        help="the fewest visual tokens that each layer needs, on your data",
        description="G-Search: finds how few visual tokens each layer needs, from shallow to deep.",
    )
    _add_options(gsearch, "vtw-gsearch", _g_search)
    add_budget(gsearch.add_argument)

    psigmoid = commands.add_parser(
        "psigmoid",
        help="the best schedule of visual tokens for a budget, on your data",
        description="P-Sigmoid: spends a budget on the schedule that disturbs answers least.",
    )
    _add_options(psigmoid, "vtw-psigmoid", _p_sigmoid)
    budget = psigmoid.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=share, help="fraction of the full decoder's work on a prompt")
    budget.add_argument("--kv-budget", type=share, help="fraction of the KV memory of stock vLLM")
    psigmoid.add_argument(
        "--trials", type=count, default=60, help="schedules that are tried (default: %(default)s)"
    )


def _add_options(parser: argparse.ArgumentParser, out: str, prepare: Prepare) -> None:
    add_options(parser.add_argument, out, samples=64)
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument(
        "--max-stages",
        type=_stages,
        default=4,
        help="runs of layers that get the same tokens, the first ones included; each is a KV-cache group or "
        "more (default: %(default)s)",
    )
    parser.set_defaults(run=lambda arguments: _run(parser, arguments, prepare))


def _stages(text: str) -> int:
    if count(text) < 2:
        raise argparse.ArgumentTypeError("2 at least: the first layers get all visual tokens")
    return int(text)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, prepare: Prepare) -> None:
    method = parser.prog.split()[-1]
    try:
        from vllm_vtw.search.reports import schedules as schedule_report

        result, policy = _searched(method, arguments, prepare)
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: {error}: install vllm-vtw with its extra [calibrate]\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(
            130,
            "\nstopped: the same command with --resume answers again, and goes on with the layers or trials "
            f"that are in {arguments.out}\n",
        )
    told = {key: result[key] for key in ("method", "made", "keeps")}
    content = policy.to_file(result["model"]) | {"search": told} if policy.stages else None
    save_results(arguments, result, content, schedule_report.html, schedule_report.table(result))


def _searched(method: str, arguments: argparse.Namespace, prepare: Prepare) -> tuple[dict[str, Any], Policy]:
    """What `result.json` has, and the policy."""
    from tqdm import tqdm

    from vllm_vtw.search.model import MODEL_TYPES, HFModel
    from vllm_vtw.search.price import Price
    from vllm_vtw.search.reports.schedules import notes
    from vllm_vtw.search.schedules.baselines import baselines
    from vllm_vtw.search.schedules.sample_at_layer import divergence_by_task
    from vllm_vtw.search.schedules.schedule import of_policy

    setup = SearchSetup.of(arguments, MODEL_TYPES)
    num_layers = setup.shape.num_hidden_layers
    search = prepare(arguments, setup.settings)
    model = HFModel(arguments.model, setup.config, setup.placement)
    answers = _answers(model, setup, arguments)
    price = Price(num_layers, model.layer_parameters, setup.shape.hidden_size, answers.request)
    found = search(model, answers, price)

    def looked_at(one: Policy) -> dict[str, Any]:
        curves = divergence_by_task(model, answers.asked, 0, of_policy(one, num_layers))
        return {
            "stages": one.to_file({})["stages"],
            "prefill_flops_share": price.flops_share(one),
            "kv_share": price.kv_share(one),
            "curves": {task: asdict(curve) for task, curve in curves.items()},
        }

    by_memory = method == "psigmoid" and arguments.kv_budget is not None
    same = price.kv_share if by_memory else price.flops_share
    beside = {method: found.policy, **baselines(found.policy, num_layers, same)}
    result = {
        "method": method,
        "model": setup.shape.as_dict(),
        "made": {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            **setup.settings,
            **answers.samples,
            **found.told,
        },
        "tasks": answers.tasks,
        "tokens_per_request": asdict(answers.request),
        "keeps": found.keeps,
        "others_take_no_more": "KV memory" if by_memory else "work",
        "policies": {
            name: looked_at(one) for name, one in tqdm(beside.items(), unit="schedule", desc="comparing")
        },
        "skipped": answers.skipped,
    }
    result["notes"] = notes(result, setup.tasks - answers.tasks.keys()) + model.prompts.notes
    return result, found.policy


def _answers(model: "HFModel", setup: SearchSetup, arguments: argparse.Namespace) -> FullAnswers:
    from vllm_vtw.search.data.random_order import draw_samples
    from vllm_vtw.search.data.sample import BadSampleError, Skipped
    from vllm_vtw.search.price import RequestTokens
    from vllm_vtw.search.resume import inputs_digest
    from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer

    order = draw_samples(setup.data.samples, arguments.seed)
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
            yield SampleAtLayer.of(model, sample.task, answered)

    skipped = setup.skipped
    asked = collect_samples(answer(), min(arguments.limit, len(order)), "answering", skipped)
    require_samples(len(asked), arguments.data)
    visual = sum(one.visual_tokens for one in asked)
    request = RequestTokens(visual / len(asked), text / len(asked), output / len(asked))
    return FullAnswers(asked, request, digest.hexdigest(), dict(sorted(tasks.items())), skipped)


def _g_search(arguments: argparse.Namespace, settings: dict[str, Any]) -> Search:
    from tqdm import tqdm

    from vllm_vtw.search.journal import Journal
    from vllm_vtw.search.schedules.gsearch import g_search, staged
    from vllm_vtw.search.schedules.schedule import FIRST_LAYER, GRID

    budget = {name: getattr(arguments, name) for name in ("max_answer_kl", "max_token_change")}
    told = budget | {"grid": GRID}
    journal = Journal(arguments.out / "gsearch.jsonl", "G-Search", settings | told, arguments.resume)

    def within(curves: "Mapping[str, Curve]") -> bool:
        return all(curve.within(*budget.values()) for curve in curves.values())

    def search(model: "HFModel", answers: FullAnswers, price: "Price") -> SearchResult:
        journal.begin(answers.samples)
        before = [line["keep"] for line in journal.found[1:]]
        keeps = list(before)
        every = range(FIRST_LAYER, price.num_layers)
        with tqdm(total=price.num_layers, initial=len(before), unit="layer", desc="searching") as bar:
            for keep in g_search(model, answers.asked, within, every, before):
                journal.add({"layer": len(keeps), "keep": keep})
                keeps.append(keep)
                bar.update()
        policy = staged(model, answers.asked, within, keeps, arguments.max_stages, price)
        return SearchResult(keeps, policy, told | {"max_stages": arguments.max_stages})

    return search


def _p_sigmoid(arguments: argparse.Namespace, settings: dict[str, Any]) -> Search:
    from tqdm import tqdm

    from vllm_vtw.search.journal import Journal
    from vllm_vtw.search.schedules.psigmoid import affordable, cheapest, p_sigmoid
    from vllm_vtw.search.schedules.sample_at_layer import divergence_by_task
    from vllm_vtw.search.schedules.schedule import of_policy

    told = {name: getattr(arguments, name) for name in ("budget", "kv_budget", "max_stages")}
    by_memory, stages = arguments.kv_budget is not None, arguments.max_stages
    option, most = ("--kv-budget", arguments.kv_budget) if by_memory else ("--budget", arguments.budget)
    journal = Journal(arguments.out / "psigmoid.jsonl", "P-Sigmoid", settings | told, arguments.resume)
    storage: Path = arguments.out / "optuna.journal"

    def search(model: "HFModel", answers: FullAnswers, price: "Price") -> SearchResult:
        if by_memory:
            # Stages are made for memory then; work tells apart those that take the same.
            price = replace(price, work_weight=1e-3)
        share = price.kv_share if by_memory else price.flops_share
        least = share(cheapest(stages, price))
        if least > most:
            raise ValueError(
                f"{option} {most:g}: on this data no schedule takes less than {least:.3f}: allow more"
            )
        if not journal.found:
            storage.unlink(missing_ok=True)
        journal.begin(answers.samples)
        with tqdm(total=arguments.trials, unit="schedule", desc="searching") as bar:
            afforded, trials = p_sigmoid(
                lambda k, m: affordable(k, m, stages, price, share, most),
                lambda one: divergence_by_task(model, answers.asked, 0, of_policy(one, price.num_layers)),
                price.num_layers,
                arguments.trials,
                arguments.seed,
                storage,
                lambda made: bar.update(made - bar.n),
            )
        sigmoid = {name: getattr(afforded, name) for name in ("k", "m", "r_max")}
        return SearchResult(afforded.keeps, afforded.policy, told | {"trials": trials} | sigmoid)

    return search
