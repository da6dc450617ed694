# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reading an engine's steps from its log."""

import json
import logging
import logging.config

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.steps import Step, Steps, logging_config, read_steps


def logged(tmp_path, steps: list[Step]) -> str:
    """What vLLM's own logger writes for these steps, under our configuration."""
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import LoggingStatLogger
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

    config = json.loads(logging_config(tmp_path).read_text())
    log = tmp_path / "log"
    config["handlers"]["timed"] = {
        "class": "logging.FileHandler",
        "filename": str(log),
        "formatter": "timed",
    }
    vllm_logger = logging.getLogger("vllm")
    before = vllm_logger.handlers[:], vllm_logger.level, vllm_logger.propagate
    logging.config.dictConfig(config)
    try:
        logger = LoggingStatLogger(VllmConfig())
        for number, step in enumerate(steps):
            details = SchedulerIterationDetails(
                iteration_index=number,
                num_ctx_requests=step.prefills,
                num_ctx_tokens=step.tokens - step.decodes if step.prefills else 0,
                num_generation_requests=step.decodes,
                num_generation_tokens=step.decodes if step.prefills else step.tokens,
                elapsed_ms=1000 * step.in_model,
                num_encoder_inputs=step.prefills,
                num_encoder_output_tokens=576 * step.prefills,
            )
            logger.record(SchedulerStats(kv_cache_usage=step.kv, iteration_details=details), None)
    finally:
        for handler in vllm_logger.handlers:
            handler.close()
        vllm_logger.handlers, vllm_logger.level, vllm_logger.propagate = before
    return log.read_text()


def test_reads_what_vllm_logs(tmp_path):
    steps = [
        Step(0, 0.5, prefills=2, decodes=0, tokens=1300, kv=0.25),
        Step(0, 0.75, prefills=1, decodes=2, tokens=602, kv=0.5),
        Step(0, 0.25, prefills=0, decodes=3, tokens=3, kv=0.5),
        Step(0, 0.5, prefills=0, decodes=3, tokens=652, kv=1.0),
    ]
    read = read_steps("1795.1 INFO something else\n" + logged(tmp_path, steps))
    assert [(s.in_model, s.prefills, s.decodes, s.tokens, s.kv) for s in read] == [
        (s.in_model, s.prefills, s.decodes, s.tokens, s.kv) for s in steps
    ]
    assert [step.is_decode for step in read] == [False, False, True, False]  # the last was preempted
    ends = [step.at for step in read]
    assert ends == sorted(ends)
    assert ends[0] > 1e9  # seconds since 1970, to the fraction


@given(
    start=st.floats(0.01, 1),
    slope=st.floats(0, 0.1),
    prefills=st.lists(st.floats(0.1, 5), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=20, unique=True),
)
def test_time_in_prompts_is_what_decoding_does_not_explain(start, slope, prefills, counts):
    at, steps = 100.0, []
    for number, seconds in enumerate(prefills):
        at += seconds + (start + slope * number if number else 0)
        steps.append(Step(at, seconds, prefills=1, decodes=number, tokens=600 + number, kv=0.1))
    for count in counts:
        at += start + slope * count
        steps.append(Step(at, start, prefills=0, decodes=count, tokens=count, kv=0.2))
    found = Steps.of(steps, asynchronous=True)
    assert found.prefill == pytest.approx(sum(prefills), rel=1e-3, abs=1e-6)
    assert found.seconds == pytest.approx(at - 100)
    assert found.most_running == max(len(prefills), *counts)
    assert found.most_kv == 0.2


def test_requests_at_once_are_counted_while_some_wait():
    steps = [
        Step(1.0, 1.0, prefills=4, decodes=0, tokens=400, kv=0.5),
        Step(4.0, 3.0, prefills=0, decodes=4, tokens=4, kv=0.5),
        Step(5.0, 1.0, prefills=2, decodes=4, tokens=204, kv=0.9),
        Step(9.0, 4.0, prefills=0, decodes=1, tokens=1, kv=0.1),
    ]
    found = Steps.of(steps, asynchronous=False)
    assert found.mean_running == pytest.approx((4 * 1 + 4 * 3 + 6 * 1) / 5)
    assert (found.count, found.in_model) == (4, 9)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_engine_without_work_takes_no_time(asynchronous):
    steps = [
        Step(1.0, 1.0, 1, 0, 100, 0.1),
        Step(2.0, 1.0, 0, 1, 1, 0.0),
        Step(101.0, 1.0, 1, 0, 100, 0.1),
    ]
    assert Steps.of(steps, asynchronous).seconds == 3


def test_a_log_without_steps_is_an_error():
    with pytest.raises(ValueError, match="no step"):
        Steps.of(read_steps("1795.1 INFO something else"), asynchronous=False)
