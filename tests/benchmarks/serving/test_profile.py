# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Where an engine's time goes."""

import time

import pytest
from torch.profiler import ProfilerActivity, profile

from benchmarks.serving.profile import Seconds, mark, table
from tests.benchmarks.serving.test_measure import SETUP
from vllm_vtw.policy import Policy


class Engine:
    def step(self) -> None:
        time.sleep(0.02)
        self.decode()
        self.decode()

    def decode(self) -> None:
        time.sleep(0.05)
        self.gather()

    def gather(self) -> None:
        time.sleep(0.01)


def test_a_part_has_no_time_of_the_parts_inside_it(monkeypatch):
    for method, part in (("step", "the rest"), ("decode", "decoder"), ("gather", "gather")):
        monkeypatch.setattr(Engine, method, getattr(Engine, method))  # put back afterwards
        mark(Engine, method, part)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        Engine().step()
    seconds = Seconds.of(profiler.events())
    assert seconds.host == pytest.approx({"the rest": 0.02, "decoder": 0.1, "gather": 0.02}, abs=0.015)
    assert not seconds.gpu


def test_table_has_every_part_and_the_sum():
    text = table(
        {"stock": {"decoder": 3.0, "tower": 0.5}, "vtw": {"decoder": 2.0, "tower": 0.5, "plan": 0.25}}
    )
    assert text.splitlines()[2:] == [
        "| decoder | 3.00 | 2.00 | 1.00 |",
        "| tower | 0.50 | 0.50 | 0.00 |",
        "| plan | 0.00 | 0.25 | -0.25 |",
        "| all | 3.50 | 2.75 | 0.75 |",
    ]


@pytest.mark.slow
def test_profiles_an_engine():
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from benchmarks.serving.profile import profiled

    point = SETUP.points[0]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds = pool.submit(profiled, SETUP, point, Policy.withdraw_at(2, 4)).result()
    assert seconds.host.keys() == {
        "the rest",
        "scheduler",
        "vision tower",
        "decoder",
        "gather and scatter",
        "step plan",
        "batch and attention metadata",
        "logits and sampling",
    }
    assert all(value > 0 for value in seconds.host.values())
