# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Model runner V2, in processes where its Triton kernels can run without a GPU."""

import os
import subprocess
import sys

import pytest

PARITY = "test_parity.py::test_every_request_shape"
PREEMPTED = "test_blocks.py::test_preempted_requests_resume_with_the_same_answers"
LOGPROBS = "test_requests.py::test_logprobs"
GRAPHS = "graph_corners.py::test_graphs_are_replayed"
slow = pytest.mark.slow


def run(plugin: str, corner: str) -> None:
    """Runs a test of this folder under `plugin`. `running` fails where V2 is not the engine's runner."""
    command = [sys.executable, "-m", "pytest", "-p", f"tests.engine.{plugin}", "-q", "-m", ""]
    result = subprocess.run(
        [*command, f"tests/engine/{corner}"], env=os.environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize(
    "corner",
    [
        pytest.param("test_blocks.py::test_several_stages", marks=slow),
        pytest.param("test_ranked.py::test_every_request_shape[four stages]", marks=slow),
        pytest.param(f"{PARITY}[K1of8-tokens-2heads-llama-64]", marks=slow),
        pytest.param(f"{PARITY}[K4of8-blocks-1heads-qwen2-8192]", marks=slow),
        pytest.param(f"{PREEMPTED}[False]", marks=slow),
        pytest.param(f"{LOGPROBS}[several apart]", marks=slow),
        pytest.param("test_lora.py", marks=slow),
        *(
            pytest.param(f"test_image_rankings.py::{name}", marks=slow)
            for name in (
                "test_every_request_shape[schedule1-uniform]",
                "test_every_request_shape[schedule10-diversity]",
                "test_every_request_may_have_another_share[diversity-True]",
                "test_orders_that_were_forgotten_are_found_again",
            )
        ),
        pytest.param("test_drafters.py::test_answers", marks=slow),
    ],
)
def test_corner(corner):
    run("triton_interpreter", corner)


@pytest.mark.parametrize(
    "corner",
    [
        f"{GRAPHS}[True-False]",
        pytest.param("graph_corners.py::test_ranked_prompts_choose_between_graphs", marks=slow),
        pytest.param("graph_corners.py::test_adapters_of_a_stage_in_its_graphs", marks=slow),
        pytest.param("graph_corners.py::test_requests_choose_between_graphs", marks=slow),
        pytest.param("graph_corners.py::test_a_stage_before_the_decoder_has_graphs", marks=slow),
        pytest.param("graph_corners.py", marks=slow),  # all of them
    ],
)
def test_corner_with_compilation_and_graphs(corner):
    run("static_graphs", corner)


@pytest.mark.parametrize(
    "corner",
    [
        pytest.param("test_gated.py::test_blocks_are_those_of_the_stage_that_was_left", marks=slow),
        "test_guard.py::test_a_request_that_arrives_gets_the_seat_of_a_reading[1]",
        pytest.param("test_guard.py", marks=slow),
        *(
            pytest.param(f"test_chosen_layer.py::{name}", marks=slow)
            for name in (
                "test_a_batch_in_which_every_request_has_another_layer[True-True]",
                "test_blocks_are_exact_from_the_first_token_on",
                "test_requests_that_are_preempted_keep_their_layer[True]",
                "test_a_request_that_chooses_a_layer_is_not_asked_by_gates",
            )
        ),
        *(
            pytest.param(f"test_image_rankings.py::{name}", marks=slow)
            for name in (
                "test_every_request_shape[schedule10-diversity]",
                "test_every_request_may_have_another_share[diversity-True]",
                "test_preempted_requests_lose_the_same_tokens[True]",
                "test_touching_images_where_the_encoder_cache_holds_one",
            )
        ),
        pytest.param("test_gated.py", marks=slow),  # all of them
    ],
)
def test_corner_with_asynchronous_scheduling(corner):
    run("asynchronous", corner)
