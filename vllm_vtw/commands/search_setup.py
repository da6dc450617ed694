# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What the commands that search have in common: options, a checkpoint, and samples of a user's data."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_vtw.config import ModelShape
from vllm_vtw.families import BY_MODEL_TYPE, DEEPSTACK, how_to_find_a_layer
from vllm_vtw.search.checkpoint import read_config, revision, supported_model
from vllm_vtw.search.data.random_order import SEEDS
from vllm_vtw.search.vtw.criteria import FIRST_LAYER_TRIED

if TYPE_CHECKING:
    from vllm_vtw.search.data.dataset import Dataset
    from vllm_vtw.search.data.sample import Skipped
    from vllm_vtw.search.model import Placement

DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAST_SAMPLES = 8
"""The number of good samples below which a search refuses to start."""
MAX_TOKEN_CHANGE = 0.01
"""The default of `--max-token-change`: the largest share of an answer's tokens that may change."""
T = TypeVar("T")


def add_options(add: Callable[..., Any], out: str, samples: int) -> None:
    """Adds the options for the model, the data, the folder for results, and how to compute.

    Args:
        add: `add_argument` of a command's parser.
        out: The default of `--out`.
        samples: The default of `--limit`.
    """
    add("model", help="name or folder of a checkpoint")
    add(
        "--data",
        type=Path,
        required=True,
        help="your samples: a file of JSON lines, a file with a JSON list, or a folder of images",
    )
    add("--prompt", help="the question about every image, if --data is a folder of images")
    add("--out", type=Path, default=Path(out), help="folder for results (default: %(default)s)")
    add(
        "--limit",
        type=count,
        default=samples,
        help="number of samples to use, drawn evenly from all tasks (default: %(default)s)",
    )
    add("--seed", type=seed, default=0, help="seed of random choices (default: %(default)s)")
    add(
        "--max-tokens",
        type=count,
        default=128,
        help="maximum number of tokens of an answer (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="data type to compute in; auto is the checkpoint's type on a GPU and float32 on the CPU",
    )
    add(
        "--device",
        default="auto",
        help="device as named in torch, such as cuda:0 (default: a GPU if there is one)",
    )
    add("--json", action="store_true", help="print the result as JSON")


def add_budget(add: Callable[..., Any]) -> None:
    """Adds the options for the budgets of the answer criterion."""
    add(
        "--max-answer-kl",
        type=bound,
        default=0.02,
        help="budget: the largest mean KL divergence of a token that any task may have, in nats "
        "(default: %(default)s)",
    )
    add(
        "--max-token-change",
        type=share,
        default=MAX_TOKEN_CHANGE,
        help="budget: the largest share of answer tokens that may change on any task (default: %(default)s)",
    )


@contextmanager
def exit_on_failure(parser: argparse.ArgumentParser, stopped: str) -> Iterator[None]:
    """Ends the process with a message if what a search does inside fails or is interrupted.

    The exit status is 2 after an error and 130 after Ctrl-C.

    Args:
        parser: The command's parser.
        stopped: What to say after Ctrl-C, if the `KeyboardInterrupt` has no message of its own.
    """
    try:
        yield
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: {error}: install vllm-vtw with its extra [calibrate]\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\nStopped: {str(stop) or stopped}\n")


def count(text: str) -> int:
    """Parses a whole number of at least 1, as an argparse type."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Parses a seed, a whole number of at least 0, as an argparse type."""
    if not text.isdecimal() or int(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {SEEDS - 1}")
    return int(text)


def bound(text: str) -> float:
    """Parses a finite number of at least 0, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def share(text: str) -> float:
    """Parses a number from 0 to 1, as an argparse type."""
    value = bound(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, a number from 0 to 1")
    return value


def values_of_layer(text: str | None, shape: ModelShape) -> list[int]:
    """The values of K that `--layers` asks for, ascending.

    For example, `"8-10,12"` means 8, 9, 10 and 12.

    Args:
        text: The option's value. None means all values from 5 on, as published.
        shape: The shape of the model.

    Raises:
        ValueError: The text is not a list of numbers and ranges, or names layers that the model lacks or at
            which it needs all visual tokens.
    """
    num_layers, first_layer = shape.num_hidden_layers, shape.first_layer
    if text is None:
        text = f"{max(first_layer, min(FIRST_LAYER_TRIED, num_layers - 1))}-{num_layers - 1}"
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first, last if dash else first]
        if not all(end.isdecimal() for end in ends):
            raise ValueError(f"--layers {text}: has to be like 8-20 or 8,12,16")
        start, stop = map(int, ends)
        if not first_layer <= start <= stop < num_layers:
            within = f"{first_layer}-{num_layers - 1}, as the model has {num_layers} layers"
            if first_layer > 1:
                within += f". {DEEPSTACK.format(first_layer)}"
            raise ValueError(f"--layers {text}: {part} is not within {within}")
        layers.update(range(start, stop + 1))
    return sorted(layers)


@dataclass(frozen=True)
class SearchSetup:
    """The checkpoint and the data of a search, as the options of `add_options` give them.

    Attributes:
        config: The checkpoint's configuration, of transformers.
        shape: What a policy file says about the model.
        placement: The device and data type to compute with.
        data: The samples, good and bad.
        settings: The settings that have to be the same if the search is resumed.
    """

    config: Any
    shape: ModelShape
    placement: "Placement"
    data: "Dataset"
    settings: dict[str, Any]

    @property
    def tasks(self) -> set[str]:
        """The tasks of all good samples, whether they are used or not."""
        return {sample.task for sample in self.data.samples}

    @property
    def skipped(self) -> list[str]:
        """For each kind of bad samples, one line that says which they are and why."""
        from vllm_vtw.search.data.sample import skip_messages

        return skip_messages(self.data.bad)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "SearchSetup":
        """Reads the data and the model's configuration, and reports bad samples on stderr.

        Args:
            arguments: The options of `add_options`.

        Raises:
            ValueError: The data cannot be read, an option is wrong, the model is not supported, or there are
                too few good samples.
        """
        from vllm_vtw.search.data.dataset import read_data
        from vllm_vtw.search.model import Placement

        if arguments.limit < LEAST_SAMPLES:
            raise ValueError(f"--limit {arguments.limit}: has to be at least {LEAST_SAMPLES}")
        try:
            data = read_data(arguments.data, arguments.prompt)
        except OSError as error:
            raise ValueError(f"--data {arguments.data}: {error.strerror or error}") from error
        config = read_config(arguments.model)
        shape = supported_model(config)
        if not BY_MODEL_TYPE[shape.model_type].in_transformers:
            raise ValueError(f"{arguments.model}: {how_to_find_a_layer(shape.model_type)}")
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
                f"--limit {arguments.limit}: has to be at least {len(setup.tasks)}, as {arguments.data} has "
                f"samples of {len(setup.tasks)} tasks"
            )
        return setup


def collect_samples(outcomes: "Iterable[Skipped | T]", total: int, what: str, skipped: list[str]) -> list[T]:
    """Goes through the outcomes of samples behind a progress bar.

    Bad samples are reported on stderr at the end, even if the search is interrupted.

    Args:
        outcomes: For each sample what was found, or why it cannot be used.
        total: The number of good samples to expect.
        what: What the bar says is being done.
        skipped: Receives the lines that report bad samples.

    Returns:
        What was found about the good samples.
    """
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
    """Checks that there are enough samples.

    Args:
        samples: The number of good samples.
        data: The file or folder that they come from.

    Raises:
        ValueError: There are fewer than `LEAST_SAMPLES`.
    """
    if samples < LEAST_SAMPLES:
        raise ValueError(f"{data} has {samples} good samples: at least {LEAST_SAMPLES} are needed")
