# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw calibrate`: the withdrawal layer K for a model on a user's own data."""

import argparse
from typing import Any

from vllm_vtw.commands.results import save_results
from vllm_vtw.commands.search_setup import (
    SearchSetup,
    add_budget,
    add_options,
    bound,
    collect_samples,
    exit_on_failure,
    require_samples,
    values_of_layer,
)
from vllm_vtw.policy import Policy
from vllm_vtw.search.vtw.criteria import FIRST_LAYER_TRIED, default_eta

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
    parser.set_defaults(parser=parser, run=_run)


def _run(arguments: argparse.Namespace) -> None:
    parser = arguments.parser
    with exit_on_failure(parser, f"samples that were measured before are kept in {arguments.out}"):
        from vllm_vtw.search.reports import calibration as report

        result = _calibrate(arguments)
    criterion = arguments.criterion
    found = result["layer"][criterion] is not None
    policy = policy_file(result, criterion) if found else None
    save_results(
        arguments, result, policy, report.html, report.table(result), f", by the {criterion} criterion"
    )


def _calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the calibration. Returns the content of `result.json`."""
    from vllm_vtw.search.data.random_order import draw_samples
    from vllm_vtw.search.model import HFModel
    from vllm_vtw.search.reports.calibration import notes
    from vllm_vtw.search.vtw import calibration
    from vllm_vtw.search.vtw.calibration_journal import CalibrationJournal, CalibrationSettings

    setup = SearchSetup.of(arguments)
    shape = setup.shape
    skipped = setup.skipped
    layers = values_of_layer(arguments.layers, shape)
    settings = CalibrationSettings(**setup.settings, layers=layers)
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
    result["skipped"] = skipped
    unseen = setup.tasks - result["tasks"].keys()
    result["notes"] = notes(result, arguments.criterion, unseen) + model.prompts.notes
    return result


def policy_file(result: dict[str, Any], criterion: str) -> dict[str, Any]:
    """The content of the policy file with the K that a criterion chose, and how it was calibrated."""
    model = result["model"]
    policy = Policy.withdraw_at(result["layer"][criterion], model["num_hidden_layers"])
    keys = ("made", "budget", "layer", "tasks", "layers", "first_token_kl", "curves")
    calibration = {"criterion": criterion} | {key: result[key] for key in keys}
    return policy.to_json(model) | {"calibration": calibration}
