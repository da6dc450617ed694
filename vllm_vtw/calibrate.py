"""`vtw calibrate`: the withdrawal layer K for a model on a user's own data."""

import argparse
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vtw.checkpoint import read_config, revision, supported_model
from vllm_vtw.config import SERVED_MODEL_TYPES
from vllm_vtw.policy import Policy
from vllm_vtw.search.criteria import FIRST_LAYER, default_eta
from vllm_vtw.search.summary import notes, table

if TYPE_CHECKING:
    from vllm_vtw.search.progress import Measured

DTYPES = ("auto", "float32", "bfloat16", "float16")
CRITERIA = ("answer", "first-token")
LEAST_SAMPLES = 8


def add_command(commands: Any) -> None:
    """Adds `calibrate` to the `vtw` command."""
    parser = commands.add_parser(
        "calibrate",
        help="the withdrawal layer for a model on your data",
        description="Chooses the withdrawal layer K for a LLaVA on your data. Needs transformers, not vLLM.",
    )
    add = parser.add_argument
    add("model", help="a checkpoint's name or folder")
    add("--data", type=Path, required=True, help="JSON lines, or a folder of pictures")
    add("--prompt", help="the question about every picture, where --data is a folder")
    add("--out", type=Path, default=Path("vtw-calibration"), help="folder for results (default: %(default)s)")
    add("--resume", action="store_true", help="go on with what --out holds; a larger --limit adds samples")
    add("--limit", type=_count, default=64, help="samples, drawn from all tasks alike (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add(
        "--layers", help=f"values of K, as 8-20 or 8,12,16 (default: all from {FIRST_LAYER} on, as published)"
    )
    add("--max-tokens", type=_count, default=128, help="of an answer (default: %(default)s)")
    add(
        "--criterion",
        choices=CRITERIA,
        default="answer",
        help="whose K the policy file has (default: answer)",
    )
    add(
        "--max-answer-kl",
        type=_bound,
        default=0.02,
        help="nats per token, on any task (default: %(default)s)",
    )
    add(
        "--max-token-change",
        type=_share,
        default=0.01,
        help="share of an answer's tokens, on any task (default: %(default)s)",
    )
    add(
        "--eta",
        type=_bound,
        help="of the first-token criterion, in nats (default: as published for the model)",
    )
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's on a GPU, float32 on the CPU")
    add("--device", default="auto", help="as in torch (default: a GPU where there is one)")
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _bound(text: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = -1.0
    if not 0 <= bound < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return bound


def _share(text: str) -> float:
    share = _bound(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, from 0 to 1")
    return share


def values_of_layer(text: str | None, num_layers: int) -> list[int]:
    """The values of K that `--layers` asks for, ascending.

    Raises:
        ValueError: It is no list or range of them.
    """
    if text is None:
        text = f"{min(FIRST_LAYER, num_layers - 1)}-{num_layers - 1}"
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first, last if dash else first]
        if not all(end.isdecimal() for end in ends):
            raise ValueError(f"--layers {text}: has to be like 8-20 or 8,12,16")
        start, stop = map(int, ends)
        if not 1 <= start <= stop < num_layers:
            within = f"1-{num_layers - 1}, as the model has {num_layers} layers"
            raise ValueError(f"--layers {text}: {part} is not a range within {within}")
        layers.update(range(start, stop + 1))
    return sorted(layers)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.limit < LEAST_SAMPLES:
        parser.error(f"--limit {arguments.limit}: fewer than {LEAST_SAMPLES} samples say nothing")
    try:
        from vllm_vtw.search import report

        result = _calibrate(arguments)
    except ImportError as error:
        parser.exit(2, f"vtw calibrate: {error}: install vllm-vtw with its extra [calibrate]\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"vtw calibrate: error: {error}\n")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\nstopped. {stop}\n")
    policy, command = arguments.out / "policy.json", None
    policy.unlink(missing_ok=True)
    found = result["layer"][arguments.criterion] is not None
    if found:
        policy.write_text(_json(policy_file(result, arguments.criterion)) + "\n")
        if result["model"]["model_type"] in SERVED_MODEL_TYPES:
            command = serve_command(arguments.model, policy)
    (arguments.out / "result.json").write_text(_json(result) + "\n")
    page = arguments.out / "report.html"
    page.write_text(report.html(result, command), encoding="utf-8")
    if arguments.json:
        print(_json(result))
    else:
        print("\n".join([*table(result), "", *result["notes"], "", f"Report: {page}"]))
        if found:
            print(f"Policy file: {policy}, by the {arguments.criterion} criterion")
        if command:
            print(f"Serve it (`vtw plan` says what it takes there):\n  {command}")
    if not found:
        sys.exit(1)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False)


def _calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `result.json` has."""
    from tqdm import tqdm

    from vllm_vtw.search import calibration
    from vllm_vtw.search.data import BadSampleError, drawn, read_data
    from vllm_vtw.search.llava import MODEL_TYPES, Llava, Placement
    from vllm_vtw.search.progress import Progress, Settings

    data = read_data(arguments.data, arguments.prompt)
    skipped = [f"{where}: {why}" for where, why in data.bad.items()]
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    _enough(len(data.samples), arguments.data)
    tasks = {sample.task for sample in data.samples}
    if len(tasks) > arguments.limit:
        raise ValueError(f"--limit {arguments.limit}: {arguments.data} has samples of {len(tasks)} tasks")
    config = read_config(arguments.model)
    model = supported_model(config, MODEL_TYPES)
    placement = Placement.of(arguments.device, arguments.dtype, config)
    settings = Settings(
        checkpoint=arguments.model,
        revision=revision(arguments.model),
        data_sha256=data.sha256,
        seed=arguments.seed,
        layers=values_of_layer(arguments.layers, model.num_hidden_layers),
        max_tokens=arguments.max_tokens,
        dtype=str(placement.dtype).removeprefix("torch."),
        device=placement.device.type,
        versions={name: version(name) for name in ("vllm-vtw", "torch", "transformers")},
    )
    progress = Progress(arguments.out, settings, arguments.resume)
    llava = Llava(arguments.model, config, placement)
    order = drawn(data.samples, arguments.seed)
    measured: list[Measured] = []
    with tqdm(total=min(arguments.limit, len(order)), unit="sample", desc="calibrating") as bar:
        try:
            for outcome in calibration.measure(llava, order, arguments.limit, settings, progress):
                if isinstance(outcome, BadSampleError):
                    bar.clear()
                    print(f"skipped: {outcome}", file=sys.stderr)
                    skipped.append(str(outcome))
                else:
                    measured.append(outcome)
                    bar.update()
        except KeyboardInterrupt:
            kept = f"{len(progress.measured)} samples are kept in {arguments.out}"
            raise KeyboardInterrupt(f"{kept}: the same command with --resume goes on") from None
    _enough(len(measured), arguments.data)
    eta = default_eta(model, config.get_text_config().vocab_size) if arguments.eta is None else arguments.eta
    budget = calibration.Budget(eta, arguments.max_answer_kl, arguments.max_token_change)
    result = calibration.result(model, llava, settings, measured, budget)
    result["skipped"] = skipped
    result["notes"] = notes(result, arguments.criterion, tasks - result["tasks"].keys())
    return result


def _enough(samples: int, data: Path) -> None:
    if samples < LEAST_SAMPLES:
        raise ValueError(f"{data} has {samples} good samples: {LEAST_SAMPLES} are needed")


def policy_file(result: dict[str, Any], criterion: str) -> dict[str, Any]:
    """The policy file of a criterion's choice, which says how it was made."""
    model = result["model"]
    policy = Policy.withdraw_at(result["layer"][criterion], model["num_hidden_layers"])
    kept = ("made", "budget", "layer", "tasks", "layers", "first_token_kl", "curves")
    calibration = {"criterion": criterion} | {key: result[key] for key in kept}
    return policy.to_file(model) | {"calibration": calibration}


def serve_command(model: str, policy: Path) -> str:
    options = json.dumps({"vtw": {"policy": str(policy)}})
    return shlex.join(["vllm", "serve", model, "--model-impl", "vtw", "--additional-config", options])
