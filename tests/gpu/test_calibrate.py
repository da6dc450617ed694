# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw calibrate` on a GPU finds what it finds on the CPU."""

import pytest

from benchmarks.quality.data import write_data
from benchmarks.quality.tasks import TASKS
from tests.search.command import calibrate, found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-3)])
def test_a_gpu_chooses_as_the_cpu(tmp_path, dtype, tolerance):
    data = write_data(tmp_path, list(TASKS), 48)
    results = []
    for device, chosen in (("cpu", "float32"), ("cuda", dtype)):
        ended = calibrate(data, tmp_path / device, f"--device={device}", f"--dtype={chosen}", "--layers=9-11")
        assert ended.status == 0, ended.err
        results.append(found(tmp_path / device))
    on_cpu, on_gpu = results
    assert on_gpu["layer"] == on_cpu["layer"]
    assert on_gpu["first_token_kl"] == pytest.approx(on_cpu["first_token_kl"], abs=tolerance)
