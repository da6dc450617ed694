# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads the dashboard and the alerts of `deploy/monitoring/`."""

import json
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "monitoring"
ALERTS = FOLDER / "alerts.yml"


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels."""
    return json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))["panels"]


def queries() -> list[str]:
    """The queries of all panels, with Grafana's variables."""
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    """The alerting rules."""
    content = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def filled_in(query: str, rate_interval: str) -> str:
    """A query as Grafana sends it, for all models.

    Args:
        query: The query, with Grafana's variables.
        rate_interval: What stands for `$__rate_interval`, such as `1m`.
    """
    return query.replace("$__rate_interval", rate_interval).replace("$model", ".+")
