# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw calibrate`: the withdrawal layer K for a model on a user's own data."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm_vtw.commands.results import save_results
from vllm_vtw.commands.search_setup import (
    SearchSetup,
    add_budget,
    add_options,
    bound,
    collect_samples,
    count,
    exit_on_failure,
    require_samples,
    share,
    values_of_layer,
)
from vllm_vtw.config import ModelShape
from vllm_vtw.families import DEEPSTACK
from vllm_vtw.policy import BY_IMAGE, check_task_name
from vllm_vtw.search.vtw.criteria import FIRST_LAYER_TRIED, default_eta

if TYPE_CHECKING:
    from vllm_vtw.search.data.sample import Sample
    from vllm_vtw.search.model import HFModel
    from vllm_vtw.search.vtw.calibration_journal import CalibrationSettings, MeasuredSample

CRITERIA = ("answer", "first-token")


def add_command(commands: Any) -> None:
    """Adds `calibrate` to the `vtw` command."""
    parser = commands.add_parser(
        "calibrate",
        help="find the withdrawal layer for a model on your data",
        description="Chooses the withdrawal layer K for a model on your data (VTW, arXiv 2405.05803). "
        "It needs transformers, but not vLLM.",
    )
    add = parser.add_argument
    add_options(add, out="vtw-calibration", samples=64)
    add(
        "--resume",
        action="store_true",
        help="continue the calibration in --out; a larger --limit adds samples",
    )
    add(
        "--layers",
        help="values of K to try, as in 8-20 or 8,12,16 "
        f"(default: all from {FIRST_LAYER_TRIED} on, as published)",
    )
    add(
        "--keep",
        type=share,
        default=1.0,
        help="share of each picture's visual tokens that goes into the decoder; K is chosen for what is left "
        "(default: all)",
    )
    add(
        "--ranking",
        choices=BY_IMAGE,
        help=f"what chooses the tokens of --keep (default: {BY_IMAGE[0]})",
    )
    add(
        "--criterion",
        choices=CRITERIA,
        default="answer",
        help="criterion that chooses the K of the policy file (default: answer)",
    )
    add_budget(add)
    add(
        "--eta",
        type=bound,
        help="bound of the first-token criterion, in nats (default: the value published for the model)",
    )
    add(
        "--per-task",
        action="store_true",
        help='choose a layer for each "task" of the data: requests that name their task get its layer',
    )
    add(
        "--max-stages",
        type=count,
        default=4,
        help="maximum number of different layers with --per-task; each takes one or more KV-cache groups "
        "(default: %(default)s)",
    )
    parser.set_defaults(parser=parser, run=_run)


def _run(arguments: argparse.Namespace) -> None:
    parser = arguments.parser
    with exit_on_failure(parser, f"samples that were measured before are kept in {arguments.out}"):
        from vllm_vtw.search.reports import calibration as report

        result = _calibrate(arguments)
    save_results(
        arguments,
        result,
        policy_file(result),
        report.html,
        report.table(result),
        f", by the {arguments.criterion} criterion{' on each task' if arguments.per_task else ''}",
    )


def _calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the calibration. Returns the content of `result.json`."""
    from vllm_vtw.search.data.random_order import draw_samples
    from vllm_vtw.search.model import HFModel
    from vllm_vtw.search.reports.calibration_notes import notes
    from vllm_vtw.search.vtw import calibration
    from vllm_vtw.search.vtw.calibration_journal import CalibrationJournal, CalibrationSettings
    from vllm_vtw.search.vtw.per_task import layer_by_task

    setup = SearchSetup.of(arguments)
    if arguments.per_task:
        _check_tasks(setup)
    shape = setup.shape
    skipped = setup.skipped
    layers = values_of_layer(arguments.layers, shape)
    ranking = arguments.ranking or BY_IMAGE[0]
    if arguments.keep < 1:
        _check_keep(arguments, shape)
        layers.append(shape.num_hidden_layers)
    elif arguments.ranking is not None:
        raise ValueError("--ranking: chooses the tokens of --keep, which is missing")
    settings = CalibrationSettings(**setup.settings, layers=layers, keep=arguments.keep, ranking=ranking)
    journal = CalibrationJournal(arguments.out, settings, arguments.resume)
    model = HFModel(arguments.model, setup.config, setup.placement)
    order = draw_samples(setup.data.samples, arguments.seed)
    outcomes = calibration.measure(model, order, arguments.limit, settings, journal)
    try:
        measured = collect_samples(outcomes, min(arguments.limit, len(order)), "calibrating", skipped)
    except KeyboardInterrupt:
        kept = f"{len(journal.measured)} samples are kept in {arguments.out}"
        raise KeyboardInterrupt(f"{kept}: run the same command with --resume to continue") from None
    require_samples(len(measured), arguments.data)
    eta = (
        default_eta(shape, setup.config.get_text_config().vocab_size)
        if arguments.eta is None
        else arguments.eta
    )
    budget = calibration.Budget(eta, arguments.max_answer_kl, arguments.max_token_change)
    result = calibration.result(shape, model, settings, measured, budget)
    result["criterion"], result["policies"] = arguments.criterion, {}
    layer = result["layer"][arguments.criterion]
    failed = []
    # With --per-task, this layer is not the one that is served.
    if layer is not None and not arguments.per_task:
        try:
            result["policies"] = _compared(model, shape, settings, setup.data.samples, measured, layer)
        except ValueError as error:
            failed = [f"Other methods could not be compared: {error}."]
    if arguments.per_task:
        unnamed = {sample.where for sample in setup.data.samples if not sample.labelled}
        result["per_task"] = layer_by_task(
            result, model, measured, unnamed, arguments.criterion, budget, arguments.max_stages
        )
    result["skipped"] = skipped
    unseen = setup.tasks - result["tasks"].keys()
    result["notes"] = notes(result, unseen) + model.prompts.notes + failed
    return result


def _compared(
    model: "HFModel",
    shape: ModelShape,
    settings: "CalibrationSettings",
    data: "Sequence[Sample]",
    measured: "Sequence[MeasuredSample]",
    layer: int,
) -> dict[str, dict[str, Any]]:
    """What the K that was chosen, and other methods that take no more work, do to answers.

    Args:
        model: The model.
        shape: Its shape.
        settings: The settings of the calibration.
        data: The samples of the data.
        measured: Those that were measured.
        layer: K.
    """
    from vllm_vtw.search.schedules.comparison import Comparison
    from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer
    from vllm_vtw.search.vtw.calibration import calibrated_policy, mean_price

    policy = calibrated_policy(layer, shape.num_hidden_layers, settings.keep, settings.ranking)
    by_place = {sample.where: sample for sample in data}
    sources = [by_place[one.where] for one in measured]

    def samples() -> "Iterator[SampleAtLayer]":
        for source, one in zip(sources, measured, strict=True):
            answered = model.answer(model.encode(source, settings.max_tokens), max_tokens=1)
            yield SampleAtLayer.of(model, one.task, model.told(answered, one.tokens))

    price = mean_price(shape.num_hidden_layers, model, measured)
    name = f"VTW, K = {layer}" if layer < shape.num_hidden_layers else "nothing behind layer 0"
    if settings.keep < 1:
        name = f"{settings.keep:g} by {settings.ranking}, then {name}"
    compare = Comparison(model, sources, price, price.flops_share, shape.first_layer, settings.max_tokens)
    return compare.of(name, policy, samples())


def _check_keep(arguments: argparse.Namespace, shape: ModelShape) -> None:
    """Checks that visual tokens may leave before the decoder.

    Raises:
        ValueError: They may not.
    """
    if arguments.keep == 0:
        raise ValueError("--keep 0: something has to go into the decoder")
    if arguments.per_task:
        raise ValueError("--keep: a policy that keeps a share has no layers to choose: remove --per-task")
    if shape.first_layer > 1:
        raise ValueError(f"--keep: {DEEPSTACK.format(shape.first_layer)}: use gsearch or psigmoid --ranking")


def _check_tasks(setup: SearchSetup) -> None:
    """Checks that the data names tasks, and that a policy file may have their names.

    Raises:
        ValueError: It names none, or a policy file may not have one of the names.
    """
    names = {sample.task for sample in setup.data.samples if sample.labelled}
    if not names:
        raise ValueError("--per-task: no sample of --data has a 'task'")
    try:
        for name in sorted(names):
            check_task_name(name)
    except ValueError as error:
        raise ValueError(f"--per-task: {error}") from error


def policy_file(result: dict[str, Any]) -> dict[str, Any] | None:
    """The content of the policy file, with how it was calibrated. None if nothing is withdrawn.

    Args:
        result: The content of `result.json`.
    """
    from vllm_vtw.search.vtw.calibration import calibrated_policy
    from vllm_vtw.search.vtw.task_layers import task_policy

    model, per_task = result["model"], result.get("per_task")
    layer = result["layer"][result["criterion"]]
    num_layers = model["num_hidden_layers"]
    if per_task is not None:
        policy = task_policy({name: task["layer"] for name, task in per_task["tasks"].items()}, num_layers)
    else:
        if layer is None:
            return None
        before = result["before_decoder"] or {"keep": 1, "ranking": BY_IMAGE[0]}
        policy = calibrated_policy(layer, num_layers, **before)
    if not policy.stages:
        return None
    keys = (
        "criterion",
        "made",
        "budget",
        "layer",
        "tasks",
        "layers",
        "first_token_kl",
        "curves",
        "per_task",
    )
    calibration = {key: result[key] for key in keys if key in result}
    return policy.to_json(model) | {"calibration": calibration}
