# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""One engine computes prompts, another one decodes, and NIXL moves blocks between them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from openai import APIStatusError, BadRequestError, OpenAI
from vllm.utils.network_utils import get_open_port

from benchmarks.server import Server, serving
from tests.engine.engines import BLOCK_SIZE, MODEL, A, Ask, B, assert_follows, picture
from tests.engine.reference import Reference
from tests.engine.test_server import message

pytest.importorskip("nixl", reason="`pip install nixl` installs it, with CUDA libraries of its own")
pytestmark = pytest.mark.slow
LAYERS = (4, 6)
VTW = {"layers": [*LAYERS], "layer": LAYERS[0], "align": False}
LAYER_BYTES = BLOCK_SIZE * MODEL.hidden * 2 * 4
"""Of a block of one layer: keys and values in float32."""


class Pair(NamedTuple):
    prefills: Server
    decodes: Server


def options(role: str, vtw: dict[str, Any] | None) -> tuple[str, ...]:
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        # Without a thread, NIXL waits until the other engine steps. More threads take cores from engines.
        "kv_connector_extra_config": {"num_threads": 1},
        "kv_buffer_device": "cpu",
    }
    plugin = ("--model-impl=vtw", f"--additional-config={json.dumps({'vtw': vtw})}") if vtw else ()
    return (
        "--dtype=float32",
        "--max-model-len=512",
        f"--block-size={BLOCK_SIZE}",
        f"--kv-cache-memory-bytes={16 << 20}",
        "--enforce-eager",
        '--limit-mm-per-prompt={"image": 2}',
        "--served-model-name=small",
        "--distributed-executor-backend=uni",
        f"--kv-transfer-config={json.dumps(transfer)}",
        *plugin,
    )


def servers(stack: ExitStack, folder: Any, **vtw_by_role: dict[str, Any] | None) -> list[Server]:
    """Starts a server of each role, at the same time."""

    def start(role: str) -> Server:
        env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(get_open_port())}
        return stack.enter_context(serving(folder, *options(role, vtw_by_role[role]), env=env))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, vtw_by_role))


@pytest.fixture(scope="module")
def pair(checkpoint) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(*servers(stack, checkpoint(MODEL), kv_producer=VTW, kv_consumer=VTW))


def ask(server: Server, images: tuple, transfer: dict[str, Any], layer: int | None, **more: Any) -> Any:
    chosen = {} if layer is None else {"vllm_xargs": {"vtw_layer": layer}}
    body = {"ignore_eos": True, "return_token_ids": True, "kv_transfer_params": transfer} | chosen
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    return client.chat.completions.create(
        model="small", messages=message(*images), temperature=0, extra_body=body, **more
    )


def prefill(server: Server, images: tuple, layer: int | None = None) -> dict[str, Any]:
    """What the engine that decodes has to be told."""
    answer = ask(server, images, {"do_remote_decode": True}, layer, max_tokens=1)
    return answer.kv_transfer_params


def moved_bytes(server: Server) -> float:
    return server.metrics().get("vllm:nixl_bytes_transferred_sum", 0.0)


def assert_right(oracle: Reference, images: tuple, answer: Any, layer: int) -> None:
    output = answer.choices[0].token_ids
    assert len(output) == 40
    assert_follows(oracle, Ask("chat", "", images), answer.prompt_token_ids, output, layer, align_to=1)


@pytest.mark.parametrize(
    ("layer", "num_images"),
    [
        (None, 0),
        (None, 1),
        (None, 2),
        (6, 1),
        (6, 2),
        (MODEL.layers, 1),
        (MODEL.layers, 2),
    ],
)
def test_answers_and_bytes(pair, checkpoint, reference, num_images, layer):
    oracle = reference(checkpoint(MODEL))
    images = tuple(picture(100 * num_images + 10 * (layer or 0) + number) for number in range(num_images))
    told = prefill(pair.prefills, images, layer)
    for again in (False, True):
        before = moved_bytes(pair.decodes)
        answer = ask(pair.decodes, images, told, layer, max_tokens=40)
        assert_right(oracle, images, answer, layer or LAYERS[0])
        tokens = len(answer.prompt_token_ids)
        text = tokens - sum(oracle.dropped(answer.prompt_token_ids, tokens, 1))
        # Blocks have memory for 4 layers. Those of the two stages of 2 layers hold 2 pages.
        stages = [(0, 1), (4, 2), (6, 2)]
        held = [(tokens if first < (layer or LAYERS[0]) else text, pages) for first, pages in stages]
        blocks = [-(-number // (BLOCK_SIZE * pages)) for number, pages in held]
        assert [len(of_group) for of_group in told["remote_block_ids"]] == blocks
        # The second time, the engine's own prefix cache has what all rows hold in whole blocks, but for the
        # last token.
        in_whole_blocks = (tokens - 1) // (2 * BLOCK_SIZE) * 2 * BLOCK_SIZE if again else 0
        cached = [in_whole_blocks // (BLOCK_SIZE * pages) for _, pages in stages]
        if not again or layer == MODEL.layers:
            moved = sum(blocks) - sum(cached)
            assert moved_bytes(pair.decodes) - before == moved * 4 * LAYER_BYTES
        told = prefill(pair.prefills, images, layer)


def test_an_engine_that_was_asked_for_another_layer(pair):
    told = prefill(pair.prefills, (A,), layer=6)
    with pytest.raises(
        BadRequestError, match=r"withdrew its visual tokens at layer 6, and this .* at layer 4: send"
    ):
        ask(pair.decodes, (A,), told, None, max_tokens=4)
    del told["vtw_layer"]
    with pytest.raises(BadRequestError, match="at no layer that is known"):
        ask(pair.decodes, (A,), told, None, max_tokens=4)


@pytest.mark.parametrize("other", [None, VTW | {"layers": [3, 6], "layer": 3}, VTW | {"align": True}])
def test_engines_that_withdraw_other_tokens_do_not_meet(pair, checkpoint, reference, other):
    oracle = reference(checkpoint(MODEL))
    with ExitStack() as stack:
        (stranger,) = servers(stack, checkpoint(MODEL), kv_producer=other)
        told = prefill(stranger, (A,), 6 if other else None) | {"vtw_layer": 6}
        with pytest.raises(APIStatusError):
            ask(pair.decodes, (A,), told, 6, max_tokens=4)
        assert "NIXL compatibility hash mismatch" in pair.decodes.log()
        told = prefill(pair.prefills, (B,), 6)
        assert_right(oracle, (B,), ask(pair.decodes, (B,), told, 6, max_tokens=40), 6)
