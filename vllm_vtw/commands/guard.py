# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw guard`: whether a running server withdraws visual tokens too early for what it is asked."""

import argparse
import json
import sys
from typing import Any

from vllm_vtw.commands.guard_counts import guard_counts
from vllm_vtw.commands.guard_report import describe, report
from vllm_vtw.commands.metrics_page import metrics_url, read_page
from vllm_vtw.commands.search_setup import MAX_TOKEN_CHANGE, share
from vllm_vtw.commands.token_change import TOO_SHALLOW

LEAST_BUDGET = 0.0001


def add_command(commands: Any) -> None:
    """Adds `guard` to the `vtw` command."""
    parser = commands.add_parser(
        "guard",
        help="say whether a server withdraws visual tokens too early for what it is asked",
        description="Reads the metrics of a server whose guard is on, and says by task and layer whether "
        "visual tokens leave too early. The guard reads some answers again with the full model, and counts "
        "the greedily decoded tokens that it would not have chosen. The counts are those since the server "
        "started.",
        epilog="For cron jobs, the exit status is 1 if a layer is too shallow for a task, 2 after an error, "
        "and 0 otherwise.",
    )
    parser.add_argument("url", metavar="URL", help="URL of the server, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--max-token-change",
        type=_budget,
        default=MAX_TOKEN_CHANGE,
        help="budget: the largest share of greedy tokens that may change (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(parser=parser, run=_run)


def _budget(text: str) -> float:
    value = share(text)
    if not LEAST_BUDGET <= value <= 1 - LEAST_BUDGET:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share that counting can tell from none and from all: it has to be from "
            f"{LEAST_BUDGET} to {1 - LEAST_BUDGET}"
        )
    return value


def _run(arguments: argparse.Namespace) -> None:
    parser = arguments.parser
    try:
        counts = guard_counts(read_page(metrics_url(arguments.url)))
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: error: {error}: install prometheus_client, which comes with vLLM\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    result = report(counts, arguments.max_token_change)
    print(json.dumps(result, indent=2, allow_nan=False) if arguments.json else describe(result))
    if any(row["verdict"] == TOO_SHALLOW for model in result["models"] for row in model["answers"]):
        sys.exit(1)
