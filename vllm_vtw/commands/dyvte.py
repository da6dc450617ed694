"""`vtw dyvte train` and `vtw dyvte eval`: gates that decide per request when its visual tokens leave."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vtw.commands.calibrate import values_of_layer
from vllm_vtw.commands.results import leave, write
from vllm_vtw.commands.samples import Subject, add_options, bound, collected, count, enough
from vllm_vtw.files import short
from vllm_vtw.policy import Gate, Policy, Stage, read_json

if TYPE_CHECKING:
    from vllm_vtw.search.dyvte.exits import Exits, Store
    from vllm_vtw.search.model import Llava

WEIGHTS = "gates.safetensors"
PUBLISHED_RATE = 4e-5
THRESHOLDS = (-2.0, -1.0, 0.0, 1.0, 2.0)

Run = Callable[[argparse.Namespace], None]


def add_command(commands: Any) -> None:
    """Adds `dyvte` to the `vtw` command."""
    dyvte = commands.add_parser(
        "dyvte",
        help="gates that decide per request when its visual tokens leave",
        description="DyVTE: gates that read a prompt's text decide when its visual tokens leave.",
    )
    parts = dyvte.add_subparsers(metavar="COMMAND", required=True)
    train = parts.add_parser("train", help="trains gates on your data; the model stays as it is")
    _add_options(train, "vtw-dyvte", 512, _train)
    add = train.add_argument
    add("--layers", help="where a gate stands, as 8-20 or 8,12,16 (default: every fourth from L/4 on)")
    add("--epochs", type=count, default=20, help="another number trains anew (default: %(default)s)")
    add("--learning-rate", type=bound, default=PUBLISHED_RATE, help="(default: %(default)s, as published)")
    add("--batch-size", type=count, default=16, help="samples of a step (default: %(default)s)")

    evaluate = parts.add_parser("eval", help="what gates do to answers, and what they save, by threshold")
    _add_options(evaluate, "vtw-dyvte-eval", 64, _eval)
    evaluate.add_argument("--policy", type=Path, required=True, help="a policy file with gates")
    evaluate.add_argument(
        "--thresholds",
        type=_thresholds,
        default=THRESHOLDS,
        metavar="T,T,...",
        help="beside those of the policy file, as in --thresholds=-1,0,1: visual tokens leave where the "
        'logit for "leave" is above the other by more; 0 is as published, more is more careful (default: '
        f"{','.join(f'{threshold:g}' for threshold in THRESHOLDS)})",
    )


def _add_options(parser: argparse.ArgumentParser, out: str, samples: int, run: Run) -> None:
    add_options(parser.add_argument, out, samples)
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments, run))


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = [nan]
    if not all(map(isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as in --thresholds=-1,0,1")
    return tuple(found)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, run: Run) -> None:
    try:
        run(arguments)
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: {error}: install vllm-vtw with its extra [calibrate]\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(
            130, f"\nstopped: what is done is in {arguments.out}; the same command with --resume goes on\n"
        )


def default_layers(num_layers: int) -> list[int]:
    """Every fourth layer from a quarter of them on."""
    return list(range(max(1, num_layers // 4), num_layers, 4))


def _train(arguments: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from vllm_vtw.gates import save_gates
    from vllm_vtw.search.dyvte.exits import Store
    from vllm_vtw.search.dyvte.training import Settings, held_out, train
    from vllm_vtw.search.model import MODEL_TYPES
    from vllm_vtw.search.reports import dyvte as dyvte_report

    subject = Subject.of(arguments, MODEL_TYPES)
    model = subject.model
    layers = default_layers(model.num_hidden_layers)
    if arguments.layers is not None:
        layers = values_of_layer(arguments.layers, model.num_hidden_layers)
    kept = subject.settings | {"layers": layers}
    store = Store(arguments.out, kept, model.hidden_size, with_answers=False, resume=arguments.resume)
    llava, seen, skipped = _looked_at(arguments, subject, layers, store)
    of_prompts = llava.prompts.notes
    del llava  # gates may need its room
    settings = Settings(arguments.epochs, arguments.learning_rate, arguments.batch_size, arguments.seed)
    of = kept | _samples(seen)
    checkpoint = arguments.out / "training.pt"
    labels = np.array([one.may_leave for one in seen], dtype=np.int64)
    with tqdm(total=settings.epochs, unit="epoch", desc="training") as bar:
        trained = train(
            store.features(seen),
            labels,
            settings,
            checkpoint,
            of,
            subject.placement.device,
            lambda ended: bar.update(ended - bar.n),
        )
    out = held_out(len(seen), settings.seed)
    tasks = _tasks(seen)
    result = {
        "method": "dyvte",
        "model": model.as_dict(),
        "made": {"when": datetime.now(UTC).isoformat(timespec="seconds"), **of, **asdict(settings)},
        "tasks": tasks,
        "layers": layers,
        "may_leave": {
            task: np.mean([one.may_leave for one in seen if one.task == task], axis=0).tolist()
            for task in tasks
        },
        "held_out": int(out.sum()),
        "held_out_may_leave": labels[out].mean(0).tolist(),
        "curves": trained.curves,
        "skipped": skipped,
    }
    result["notes"] = dyvte_report.notes(result, subject.tasks - tasks.keys()) + of_prompts
    sha256 = save_gates(dict(zip(layers, trained.gates, strict=True)), arguments.out / WEIGHTS)
    policy = Policy(tuple(Stage(layer, 0.0) for layer in layers), Gate(WEIGHTS, sha256, (0.0,) * len(layers)))
    content = policy.to_file(result["model"]) | {"training": result["made"]}
    checkpoint.unlink()
    leave(arguments, result, content, dyvte_report.html, dyvte_report.table(result))


def _eval(arguments: argparse.Namespace) -> None:
    import torch

    from vllm_vtw.gates import load_gates, margins
    from vllm_vtw.search.dyvte.exits import Store
    from vllm_vtw.search.dyvte.gated import evaluated
    from vllm_vtw.search.model import MODEL_TYPES
    from vllm_vtw.search.price import Price, Request
    from vllm_vtw.search.reports import dyvte as dyvte_report

    subject = Subject.of(arguments, MODEL_TYPES)
    model = subject.model
    policy, learned_from = _gated(arguments.policy, model.as_dict())
    assert policy.gate is not None
    layers = [stage.layer for stage in policy.stages]
    gates = load_gates(policy.gate, layers, model.hidden_size)
    kept = subject.settings | {"layers": layers}
    store = Store(arguments.out, kept, model.hidden_size, with_answers=True, resume=arguments.resume)
    llava, seen, skipped = _looked_at(arguments, subject, layers, store)
    read = torch.from_numpy(store.features(seen))
    found = torch.stack([margins(gate, read[:, at]) for at, gate in enumerate(gates)], 1).numpy()

    def price(one: "Exits") -> Price:
        request = Request(one.visual_tokens, one.text_tokens, one.output_tokens)
        return Price(model.num_hidden_layers, llava.layer_parameters, model.hidden_size, request)

    tasks = _tasks(seen)
    result = {
        "method": "dyvte",
        "model": model.as_dict(),
        "made": {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            **kept,
            **_samples(seen),
            "policy": str(arguments.policy),
            "gates_sha256": policy.gate.sha256,
        },
        "tasks": tasks,
        "layers": layers,
        "rows": evaluated(seen, found, policy, price, model.num_hidden_layers, arguments.thresholds),
        "skipped": skipped,
    }
    notes = dyvte_report.notes_of_evaluation(
        result, subject.tasks - tasks.keys(), learned_from == subject.data.sha256
    )
    result["notes"] = notes = notes + llava.prompts.notes
    write(
        arguments,
        result,
        dyvte_report.evaluation_html(result),
        [*dyvte_report.evaluation_table(result), *notes],
    )


def _gated(file: Path, model: dict[str, Any]) -> tuple[Policy, Any]:
    """The policy of a file, with the path of its gates, and the SHA-256 of the data that they learned."""
    try:
        policy = Policy.read(file, model)
        training = read_json(file).get("training")
    except ValueError as error:
        raise ValueError(f"--policy {short(str(file))}: {error}") from error
    if policy.gate is None:
        raise ValueError(f"--policy {short(str(file))} has no gates: `vtw dyvte train` makes them")
    return policy, training.get("data_sha256") if isinstance(training, dict) else None


def _looked_at(
    arguments: argparse.Namespace, subject: Subject, layers: list[int], store: "Store"
) -> "tuple[Llava, list[Exits], list[str]]":
    """The model, what was seen of samples, and the bad ones."""
    from vllm_vtw.search.data.draw import drawn
    from vllm_vtw.search.dyvte.exits import look
    from vllm_vtw.search.model import Llava

    llava = Llava(arguments.model, subject.config, subject.placement)
    order = drawn(subject.data.samples, arguments.seed)
    skipped = subject.skipped
    outcomes = look(llava, order, arguments.limit, layers, arguments.max_tokens, store)
    seen = collected(outcomes, min(arguments.limit, len(order)), "answering", skipped)
    enough(len(seen), arguments.data)
    return llava, seen, skipped


def _samples(seen: "list[Exits]") -> dict[str, Any]:
    inputs = "".join(one.inputs_sha256 for one in seen)
    return {"samples": len(seen), "samples_sha256": hashlib.sha256(inputs.encode()).hexdigest()}


def _tasks(seen: "list[Exits]") -> dict[str, dict[str, int]]:
    """By task, how many samples and tokens, and how many answers were cut."""
    tasks = sorted({one.task for one in seen})
    of_task = {task: [one for one in seen if one.task == task] for task in tasks}
    return {
        task: {
            "samples": len(some),
            "tokens": sum(one.output_tokens for one in some),
            "cut": sum(one.cut for one in some),
        }
        for task, some in of_task.items()
    }
