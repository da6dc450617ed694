"""What the commands that search begin with: a checkpoint, and samples of a user's data."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_vtw.config import ModelShape
from vllm_vtw.search.checkpoint import read_config, revision, supported_model
from vllm_vtw.search.data.random_order import SEEDS
from vllm_vtw.search.vtw.criteria import FIRST_LAYER

if TYPE_CHECKING:
    from vllm_vtw.search.data.dataset import Dataset
    from vllm_vtw.search.data.sample import Skipped
    from vllm_vtw.search.model import Placement

DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAST_SAMPLES = 8
T = TypeVar("T")


def add_options(add: Callable[..., Any], out: str, samples: int) -> None:
    """Adds the options that say what is asked, of which model, and where results go.

    Args:
        add: `add_argument` of a command's parser.
        out: Default folder for results.
        samples: Default number of them.
    """
    add("model", help="a checkpoint's name or folder")
    add("--data", type=Path, required=True, help="JSON lines, a JSON list, or a folder of pictures")
    add("--prompt", help="the question about every picture, where --data is a folder")
    add("--out", type=Path, default=Path(out), help="folder for results (default: %(default)s)")
    add(
        "--limit",
        type=count,
        default=samples,
        help="samples, drawn from all tasks alike (default: %(default)s)",
    )
    add("--seed", type=seed, default=0, help="of the draw, and of a sampler (default: %(default)s)")
    add("--max-tokens", type=count, default=128, help="of an answer (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's on a GPU, float32 on the CPU")
    add("--device", default="auto", help="as in torch (default: a GPU where there is one)")
    add("--json", action="store_true", help="print the result as JSON")


def add_budget(add: Callable[..., Any]) -> None:
    """Adds the options of the answer criterion."""
    add(
        "--max-answer-kl",
        type=bound,
        default=0.02,
        help="nats per token, on any task (default: %(default)s)",
    )
    add(
        "--max-token-change",
        type=share,
        default=0.01,
        help="share of an answer's tokens, on any task (default: %(default)s)",
    )


def count(text: str) -> int:
    """A number from 1 on, of argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 on, of argparse."""
    if not text.isdecimal() or int(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {SEEDS - 1}")
    return int(text)


def bound(text: str) -> float:
    """A number from 0 on, of argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def share(text: str) -> float:
    """A number from 0 to 1, of argparse."""
    value = bound(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, from 0 to 1")
    return value


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


@dataclass(frozen=True)
class SearchSetup:
    """What is asked, and of which model.

    Attributes:
        config: The checkpoint's configuration, of transformers.
        shape: What a policy file says of it.
        placement: Where it computes.
        data: The samples, good ones and bad.
        settings: What samples of one search have to have in common.
    """

    config: Any
    shape: ModelShape
    placement: "Placement"
    data: "Dataset"
    settings: dict[str, Any]

    @property
    def tasks(self) -> set[str]:
        """Of all good samples, drawn or not."""
        return {sample.task for sample in self.data.samples}

    @property
    def skipped(self) -> list[str]:
        """The bad samples, and why."""
        from vllm_vtw.search.data.sample import skip_messages

        return skip_messages(self.data.bad)

    @classmethod
    def of(cls, arguments: argparse.Namespace, model_types: Sequence[str]) -> "SearchSetup":
        """Of the options of `add_options`.

        Raises:
            ValueError: Of what is wrong with them, with the data or the model.
        """
        from vllm_vtw.search.data.dataset import read_data
        from vllm_vtw.search.model import Placement

        if arguments.limit < LEAST_SAMPLES:
            raise ValueError(f"--limit {arguments.limit}: fewer than {LEAST_SAMPLES} samples say nothing")
        data = read_data(arguments.data, arguments.prompt)
        config = read_config(arguments.model)
        shape = supported_model(config, model_types)
        placement = Placement.of(arguments.device, arguments.dtype, config)
        settings = {
            "checkpoint": arguments.model,
            "revision": revision(arguments.model),
            "data_sha256": data.sha256,
            "seed": arguments.seed,
            "max_tokens": arguments.max_tokens,
            "dtype": str(placement.dtype).removeprefix("torch."),
            "device": placement.device.type,
            "versions": {name: version(name) for name in ("vllm-vtw", "torch", "transformers")},
        }
        setup = cls(config, shape, placement, data, settings)
        _print_skipped(setup.skipped)
        require_samples(len(data.samples), arguments.data)
        if len(setup.tasks) > arguments.limit:
            raise ValueError(
                f"--limit {arguments.limit}: {arguments.data} has samples of {len(setup.tasks)} tasks"
            )
        return setup


def collect_samples(outcomes: "Iterable[Skipped | T]", total: int, what: str, skipped: list[str]) -> list[T]:
    """The good samples, behind a bar; bad ones are told, though it be interrupted, and added to `skipped`."""
    from tqdm import tqdm

    from vllm_vtw.search.data.sample import Skipped, skip_messages

    good: list[T] = []
    bad: list[Skipped] = []
    try:
        with tqdm(total=total, unit="sample", desc=what) as bar:
            for outcome in outcomes:
                if isinstance(outcome, Skipped):
                    bad.append(outcome)
                else:
                    good.append(outcome)
                    bar.update()
    finally:
        lines = skip_messages(bad)
        _print_skipped(lines)
        skipped += lines
    return good


def _print_skipped(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)


def require_samples(samples: int, data: Path) -> None:
    """Raises a ValueError where samples are too few."""
    if samples < LEAST_SAMPLES:
        raise ValueError(f"{data} has {samples} good samples: {LEAST_SAMPLES} are needed")
