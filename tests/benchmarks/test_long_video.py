# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The documentation says what long videos cost, as it was measured."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
VIDEOS = json.loads((ROOT / "benchmarks/results/cpu-long-video.json").read_text())["videos"]


def of(engine: str, part: str) -> list[float]:
    return [row["median_microseconds"][part] for row in VIDEOS if row["engine"] == engine]


def test_the_documentation():
    page = " ".join((ROOT / "docs/benchmarks.md").read_text().split())

    def span(engine: str, part: str) -> str:
        return f"{min(of(engine, part)):.0f} to {max(of(engine, part)):.0f}"

    assert (
        f"the scheduler took {span('stock', 'scheduler')} microseconds of CPU time in stock vLLM and "
        f"{span('vtw', 'scheduler')} with the plugin, of which {span('stock', 'KV manager')} and "
        f"{span('vtw', 'KV manager')} are the KV manager. The attention metadata took "
        f"{span('stock', 'attention metadata')} and {span('vtw', 'attention metadata')}, of which "
        f"{span('vtw', 'step plan')} are the step plan"
    ) in page
    parts = ("scheduler", "KV manager", "attention metadata", "step plan")
    growth = max(max(of("vtw", part)) / min(of("vtw", part)) - 1 for part in parts)
    assert f"none of these grows by more than {growth:.0%}" in page
    arrival = [1e-3 * microseconds for microseconds in of("vtw", "arrival")]
    assert f"in {min(arrival):.2f} to {max(arrival):.2f} milliseconds" in page
    held, more = (
        {engine: max(row[key] for row in VIDEOS if row["engine"] == engine) for engine in ("stock", "vtw")}
        for key in ("kv_share", "more_mib")
    )
    assert f"A video took {held['vtw'] / held['stock']:.2f} times the KV memory" in page
    assert f"at most {more['vtw']} MiB more memory" in page
    assert f"against {more['stock']} in stock vLLM" in page
