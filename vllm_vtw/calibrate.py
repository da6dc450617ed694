"""`vtw calibrate`: the withdrawal layer K for a model on a user's own data."""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_vtw.config import SERVED_MODEL_TYPES
from vllm_vtw.policy import Policy
from vllm_vtw.search.criteria import default_eta

DTYPES = ("auto", "float32", "bfloat16", "float16")
CRITERIA = ("answer", "first-token")
LEAST_SAMPLES = 8
SHOWN_SKIPPED = 10


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
    add("--layers", help="values of K, as 5-20 or 8,12,16 (default: all)")
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
        type=_bound,
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


def values_of_layer(text: str | None, num_layers: int) -> list[int]:
    """The values of K that `--layers` asks for, ascending.

    Raises:
        ValueError: It is no list or range of them.
    """
    most = num_layers - 1
    if text is None:
        return list(range(1, num_layers))
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"--layers {text}: has to be like 5-20 or 8,12,16")
        layers.update(range(int(first), int(last or first) + 1))
    if not layers or min(layers) < 1 or max(layers) > most:
        raise ValueError(f"--layers {text}: has to be within 1-{most}, as the model has {num_layers} layers")
    return sorted(layers)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.limit < LEAST_SAMPLES:
        parser.error(f"--limit {arguments.limit}: fewer than {LEAST_SAMPLES} samples say nothing")
    try:
        from vllm_vtw.search import report

        result, skipped = _calibrate(arguments)
    except ModuleNotFoundError as error:
        parser.exit(2, f"vtw calibrate: {error.name} is missing: pip install 'vllm-vtw[calibrate]'\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"vtw calibrate: error: {error}\n")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\nstopped. {stop}\n")
    policy = arguments.out / "policy.json"
    policy.unlink(missing_ok=True)
    command = None
    if result["layer"][arguments.criterion] is not None:
        policy.write_text(json.dumps(policy_file(result, arguments.criterion), indent=2) + "\n")
        command = serve_command(arguments.model, policy)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    page = arguments.out / "report.html"
    page.write_text(report.html(result, notes(result, arguments.criterion), skipped, command))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(describe(result, arguments.criterion))
        print(f"\nReport: {page}")
        if command:
            print(f"Policy file: {policy}, for\n  {command}")
    if command is None:
        sys.exit(1)


def _calibrate(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The result, and what was skipped and why."""
    from tqdm import tqdm

    from vllm_vtw.search import calibration
    from vllm_vtw.search.data import BadSampleError, drawn, read_data
    from vllm_vtw.search.llava import Llava

    samples, bad = read_data(arguments.data, arguments.prompt)
    skipped = [f"{where}: {why}" for where, why in bad.items()]
    for number, line in enumerate(skipped):
        _report_skipped(line, number)
    if len(samples) < LEAST_SAMPLES:
        raise ValueError(
            f"{arguments.data} has {len(samples)} samples that can be read: {LEAST_SAMPLES} are needed"
        )
    llava = Llava(arguments.model, arguments.device, arguments.dtype)
    settings = calibration.Settings(
        checkpoint=arguments.model,
        config_sha256=hashlib.sha256(llava.config.to_json_string().encode()).hexdigest(),
        data_sha256=calibration.data_digest(arguments.data, arguments.prompt),
        seed=arguments.seed,
        layers=values_of_layer(arguments.layers, llava.shape.num_hidden_layers),
        max_tokens=arguments.max_tokens,
        dtype=str(llava.model.dtype).removeprefix("torch."),
    )
    progress = calibration.Progress(arguments.out, settings, arguments.resume)
    total = min(arguments.limit, len(samples))
    with tqdm(total=total, initial=len(progress.measured), unit="sample", desc="calibrating") as bar:
        try:
            for outcome in calibration.measure(
                llava, drawn(samples, arguments.seed), arguments.limit, settings, progress
            ):
                if isinstance(outcome, BadSampleError):
                    _report_skipped(str(outcome), len(skipped))
                    skipped.append(str(outcome))
                else:
                    bar.update()
        except KeyboardInterrupt:
            kept = f"{len(progress.measured)} of {total} samples are kept in {arguments.out}"
            raise KeyboardInterrupt(f"{kept}: the same command with --resume goes on") from None
    if len(progress.measured) < LEAST_SAMPLES:
        raise ValueError(
            f"{len(progress.measured)} samples of {arguments.data} are good: {LEAST_SAMPLES} are needed"
        )
    budget = calibration.Budget(
        eta=default_eta(llava.shape) if arguments.eta is None else arguments.eta,
        max_answer_kl=arguments.max_answer_kl,
        max_token_change=arguments.max_token_change,
    )
    measured = progress.measured[: arguments.limit]
    return calibration.result(llava.shape, llava.layer_parameters, settings, measured, budget), skipped


def _report_skipped(line: str, number: int) -> None:
    if number < SHOWN_SKIPPED:
        print(f"skipped: {line}", file=sys.stderr)
    elif number == SHOWN_SKIPPED:
        print("skipped: more, which the report lists", file=sys.stderr)


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


def notes(result: dict[str, Any], criterion: str) -> list[str]:
    """What a reader has to know beside the numbers."""
    said = []
    layer, most = result["layer"][criterion], result["budget"]["max_token_change"]
    if layer is None:
        said.append(
            f"No K that was looked at satisfies the {criterion} criterion, so there is no policy file: "
            "look at other --layers, allow more, or serve without withdrawal."
        )
    elif result["kv_share"][result["layers"].index(layer)] >= 1:
        said.append(
            f"At K = {layer} the padding of vLLM's KV-cache groups takes more memory than withdrawal saves, "
            "as `vtw plan` shows: allow more, or serve without withdrawal."
        )
    # No change in n tokens leaves a share of 3/n possible, at 95%.
    few = [
        f"{task} ({count['tokens']})" for task, count in result["tasks"].items() if most * count["tokens"] < 3
    ]
    if few:
        said.append(
            f"Too few tokens of answers to tell {most:.1%} of them from none: {', '.join(few)}. "
            "A larger --limit with --resume adds samples."
        )
    if result["model"]["model_type"] not in SERVED_MODEL_TYPES:
        said.append(f"This version of --model-impl vtw does not serve {result['model']['model_type']} yet.")
    return said


def describe(result: dict[str, Any], criterion: str) -> str:
    """Both criteria side by side, for people."""
    layers, tokens = result["layers"], sum(count["tokens"] for count in result["tasks"].values())

    def row(name: str, values: Iterable[str]) -> str:
        return f"{name:34}" + "".join(f"{value:>14}" for value in values)

    def shares(name: str, values: Sequence[float]) -> str:
        at = [None if layer is None else layers.index(layer) for layer in result["layer"].values()]
        return row(name, ("" if index is None else f"{values[index]:.1%}" for index in at))

    chosen = ("none" if layer is None else str(layer) for layer in result["layer"].values())
    lines = [
        f"{result['made']['samples']} samples, {tokens} tokens of answers",
        "",
        row("criterion", result["layer"]),
        row(f"K, of {result['model']['num_hidden_layers']} layers", chosen),
        shares("KV memory, of stock vLLM's", result["kv_share"]),
        shares("decoder's work in prefill", result["prefill_flops_share"]),
    ]
    for task, curve in result["curves"].items():
        lines.append(shares(f"{task}: tokens changed", curve["token_change"]))
        lines.append(shares(f"{task}: answers changed", curve["answer_change"]))
    said = notes(result, criterion)
    return "\n".join([*lines, *([""] if said else []), *said])
