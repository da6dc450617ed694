# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw dyvte train` and `vtw dyvte eval`: gates that decide per request where its visual tokens leave."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vtw.commands.results import save_results, write_report
from vllm_vtw.commands.search_setup import (
    SearchSetup,
    add_options,
    bound,
    collect_samples,
    count,
    exit_on_failure,
    require_samples,
    values_of_layer,
)
from vllm_vtw.policy import Gate, Policy, Stage, read_json
from vllm_vtw.untrusted_files import shorten

if TYPE_CHECKING:
    from vllm_vtw.search.dyvte.exit_labels import ExitStore, SampleExits
    from vllm_vtw.search.model import HFModel

WEIGHTS = "gates.safetensors"
PUBLISHED_RATE = 4e-5
"""The learning rate that DyVTE's paper trains its gates with."""
THRESHOLDS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""The thresholds that `vtw dyvte eval` compares by default."""

Run = Callable[[argparse.Namespace], None]


def add_command(commands: Any) -> None:
    """Adds `dyvte` to the `vtw` command."""
    dyvte = commands.add_parser(
        "dyvte",
        help="train and evaluate gates that decide per request where its visual tokens leave",
        description="DyVTE (arXiv 2411.19628): gates read a prompt's text and decide at which layer its "
        "visual tokens leave.",
    )
    parts = dyvte.add_subparsers(metavar="COMMAND", required=True)
    train = parts.add_parser(
        "train",
        help="train gates on your data; the model is not changed",
        description="Trains gates on your data and writes them with a policy file. The model is not changed.",
    )
    _add_options(train, "vtw-dyvte", 512, _train)
    add = train.add_argument
    add(
        "--layers",
        help="layers with a gate before them, as in 8-20 or 8,12,16 (default: every fourth from L/4 on)",
    )
    add(
        "--epochs",
        type=count,
        default=20,
        help="number of epochs; with --resume, another number trains from the start (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=bound,
        default=PUBLISHED_RATE,
        help="highest learning rate (default: %(default)s, as published)",
    )
    add("--batch-size", type=count, default=16, help="samples of a training step (default: %(default)s)")

    evaluate = parts.add_parser(
        "eval",
        help="show what gates do to answers, and what they save, by threshold",
        description="Shows what the gates of a policy file do to answers on your data, and what they save.",
    )
    _add_options(evaluate, "vtw-dyvte-eval", 64, _eval)
    evaluate.add_argument("--policy", type=Path, required=True, help="a policy file with gates")
    evaluate.add_argument(
        "--thresholds",
        type=_thresholds,
        default=THRESHOLDS,
        metavar="T,T,...",
        help="thresholds to evaluate besides those of the policy file, as in --thresholds=-1,0,1. Visual "
        'tokens leave if the logit for "leave" exceeds the other by more than the threshold. The published '
        "value is 0, and larger values are more careful (default: "
        f"{','.join(f'{threshold:g}' for threshold in THRESHOLDS)})",
    )


def _add_options(parser: argparse.ArgumentParser, out: str, samples: int, run: Run) -> None:
    add_options(parser.add_argument, out, samples)
    parser.add_argument("--resume", action="store_true", help="continue with what is in --out")
    parser.set_defaults(parser=parser, run=partial(_run, run))


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        thresholds = sorted({float(part) for part in text.split(",")})
    except ValueError:
        thresholds = [nan]
    if not all(map(isfinite, thresholds)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as in --thresholds=-1,0,1")
    return tuple(thresholds)


def _run(run: Run, arguments: argparse.Namespace) -> None:
    stopped = f"the work so far is in {arguments.out}. Run the same command with --resume to continue."
    with exit_on_failure(arguments.parser, stopped):
        run(arguments)


def default_layers(num_layers: int, first_layer: int = 1) -> list[int]:
    """The layers that have a gate by default: every fourth, from a quarter of all layers on.

    Args:
        num_layers: The number of decoder layers.
        first_layer: The first layer that visual tokens may leave at.
    """
    return list(range(max(first_layer, num_layers // 4), num_layers, 4))


def _train(arguments: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from vllm_vtw.gates import save_gates
    from vllm_vtw.search.dyvte.exit_labels import ExitStore
    from vllm_vtw.search.dyvte.training import TrainingSettings, held_out, train
    from vllm_vtw.search.reports import dyvte as dyvte_report

    setup = SearchSetup.of(arguments)
    shape = setup.shape
    layers = default_layers(shape.num_hidden_layers, shape.first_layer)
    if arguments.layers is not None:
        layers = values_of_layer(arguments.layers, shape)
    exit_settings = setup.settings | {"layers": layers}
    store = ExitStore(
        arguments.out, exit_settings, shape.hidden_size, with_answers=False, resume=arguments.resume
    )
    model, exits, skipped = _run_samples(arguments, setup, layers, store)
    prompt_notes = model.prompts.notes
    del model  # The training of the gates may need its memory.
    settings = TrainingSettings(
        arguments.epochs, arguments.learning_rate, arguments.batch_size, arguments.seed
    )
    identity = exit_settings | _samples_identity(exits)
    checkpoint = arguments.out / "training.pt"
    labels = np.array([sample.may_leave for sample in exits], dtype=np.int64)
    with tqdm(total=settings.epochs, unit="epoch", desc="training") as bar:
        trained = train(
            store.features(exits),
            labels,
            settings,
            checkpoint,
            identity,
            setup.placement.device,
            lambda epochs: bar.update(epochs - bar.n),
        )
    is_held_out = held_out(len(exits), settings.seed)
    tasks = _tasks(exits)
    result = {
        "method": "dyvte",
        "model": shape.as_dict(),
        "made": {"when": datetime.now(UTC).isoformat(timespec="seconds"), **identity, **asdict(settings)},
        "tasks": tasks,
        "layers": layers,
        "may_leave": {
            task: np.mean([sample.may_leave for sample in exits if sample.task == task], axis=0).tolist()
            for task in tasks
        },
        "held_out": int(is_held_out.sum()),
        "held_out_may_leave": labels[is_held_out].mean(0).tolist(),
        "curves": trained.curves,
        "skipped": skipped,
    }
    result["notes"] = dyvte_report.notes(result, setup.tasks - tasks.keys()) + prompt_notes
    sha256 = save_gates(dict(zip(layers, trained.gates, strict=True)), arguments.out / WEIGHTS)
    policy = Policy(tuple(Stage(layer, 0.0) for layer in layers), Gate(WEIGHTS, sha256, (0.0,) * len(layers)))
    content = policy.to_json(result["model"]) | {"training": result["made"]}
    checkpoint.unlink()
    save_results(arguments, result, content, dyvte_report.html, dyvte_report.table(result))


def _eval(arguments: argparse.Namespace) -> None:
    import torch

    from vllm_vtw.gates import leave_margins, load_gates
    from vllm_vtw.search.dyvte.evaluation import evaluate_gates
    from vllm_vtw.search.dyvte.exit_labels import ExitStore
    from vllm_vtw.search.price import Price, RequestTokens
    from vllm_vtw.search.reports import dyvte as dyvte_report

    setup = SearchSetup.of(arguments)
    shape = setup.shape
    policy, training_data_sha256 = _read_gated_policy(arguments.policy, shape.as_dict())
    assert policy.gate is not None
    layers = [stage.layer for stage in policy.stages]
    gates = load_gates(policy.gate, layers, shape.hidden_size)
    exit_settings = setup.settings | {"layers": layers}
    store = ExitStore(
        arguments.out, exit_settings, shape.hidden_size, with_answers=True, resume=arguments.resume
    )
    model, exits, skipped = _run_samples(arguments, setup, layers, store)
    features = torch.from_numpy(store.features(exits))
    by_gate = [leave_margins(gate, features[:, number]) for number, gate in enumerate(gates)]
    margins = torch.stack(by_gate, 1).numpy()

    def price(sample: "SampleExits") -> Price:
        request = RequestTokens(sample.visual_tokens, sample.text_tokens, sample.output_tokens)
        return Price(shape.num_hidden_layers, model.layer_parameters, model.attention_width, request)

    tasks = _tasks(exits)
    result = {
        "method": "dyvte",
        "model": shape.as_dict(),
        "made": {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            **exit_settings,
            **_samples_identity(exits),
            "policy": str(arguments.policy),
            "gates_sha256": policy.gate.sha256,
        },
        "tasks": tasks,
        "layers": layers,
        "rows": evaluate_gates(exits, margins, policy, price, shape.num_hidden_layers, arguments.thresholds),
        "skipped": skipped,
    }
    notes = dyvte_report.notes_of_evaluation(
        result, setup.tasks - tasks.keys(), training_data_sha256 == setup.data.sha256
    )
    result["notes"] = notes = notes + model.prompts.notes
    write_report(
        arguments,
        result,
        dyvte_report.evaluation_html(result),
        [*dyvte_report.evaluation_table(result), *notes],
    )


def _read_gated_policy(file: Path, model: dict[str, Any]) -> tuple[Policy, Any]:
    """Reads a policy file with gates.

    Returns:
        The policy, and the SHA-256 of the data that the gates were trained on. None if the file has no such
        hash.
    """
    try:
        policy = Policy.read(file, model)
        training = read_json(file).get("training")
    except ValueError as error:
        raise ValueError(f"--policy {shorten(str(file))}: {error}") from error
    if policy.gate is None:
        raise ValueError(f"--policy {shorten(str(file))} has no gates: `vtw dyvte train` makes them")
    return policy, training.get("data_sha256") if isinstance(training, dict) else None


def _run_samples(
    arguments: argparse.Namespace, setup: SearchSetup, layers: list[int], store: "ExitStore"
) -> "tuple[HFModel, list[SampleExits], list[str]]":
    """Runs the model on the samples. Returns the model, what was found, and the lines about bad samples."""
    from vllm_vtw.search.data.random_order import draw_samples
    from vllm_vtw.search.dyvte.exit_labels import collect_exits
    from vllm_vtw.search.model import HFModel

    model = HFModel(arguments.model, setup.config, setup.placement)
    order = draw_samples(setup.data.samples, arguments.seed)
    skipped = setup.skipped
    outcomes = collect_exits(model, order, arguments.limit, layers, arguments.max_tokens, store)
    exits = collect_samples(outcomes, min(arguments.limit, len(order)), "answering", skipped)
    require_samples(len(exits), arguments.data)
    return model, exits, skipped


def _samples_identity(exits: "list[SampleExits]") -> dict[str, Any]:
    """The number of samples, and a hash of everything that the model got for them."""
    inputs = "".join(sample.inputs_sha256 for sample in exits)
    return {"samples": len(exits), "samples_sha256": hashlib.sha256(inputs.encode()).hexdigest()}


def _tasks(exits: "list[SampleExits]") -> dict[str, dict[str, int]]:
    """By task, the number of samples, of answer tokens, and of answers that were cut."""
    tasks = sorted({sample.task for sample in exits})
    by_task = {task: [sample for sample in exits if sample.task == task] for task in tasks}
    return {
        task: {
            "samples": len(samples),
            "tokens": sum(sample.output_tokens for sample in samples),
            "cut": sum(sample.cut for sample in samples),
        }
        for task, samples in by_task.items()
    }
