# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Two replicas behind Ray Serve, as `deploy/ray-serve.yaml` has them, on the CPU and with a small model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from openai import OpenAI
from PIL.Image import Image
from vllm.utils.network_utils import get_open_port

from tests.engine.engines import BLOCK_SIZE, MODEL, Ask, assert_follows, picture
from tests.engine.test_server import message

ray = pytest.importorskip("ray", reason="`pip install 'ray[serve]' jsonref pyarrow` installs it")
serve = pytest.importorskip("ray.serve")
llm = pytest.importorskip("ray.serve.llm")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LAYER = MODEL.layers // 2


@pytest.fixture(scope="module")
def client(checkpoint) -> Iterator[OpenAI]:
    (application,) = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (config,) = application["args"]["llm_configs"]
    config["model_loading_config"]["model_source"] = str(checkpoint(MODEL))
    config["engine_kwargs"]["additional_config"]["vtw"]["layer"] = LAYER
    config["engine_kwargs"] |= {
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 16 << 20,
        "enforce_eager": True,
        "enable_prompt_tokens_details": True,
    }
    config["accelerator_config"] = {"kind": "cpu"}
    config["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    variables = {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ray.init(num_cpus=8, include_dashboard=False, runtime_env={"env_vars": variables})
    port = get_open_port()
    serve.start(http_options={"port": port})
    serve.run(llm.build_openai_app(application["args"]))
    yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    serve.shutdown()
    ray.shutdown()


def test_requests_for_one_image_meet_its_cache(client, checkpoint, reference):
    oracle = reference(checkpoint(MODEL))

    def cached(image: Image, session: str) -> int:
        answer = client.chat.completions.create(
            model="llava",
            messages=message(image),
            temperature=0,
            max_tokens=16,
            extra_headers={"x-session-id": session},
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        told = answer.prompt_token_ids, answer.choices[0].token_ids
        assert_follows(oracle, Ask("chat", "", (image,)), *told, LAYER, BLOCK_SIZE)
        return answer.usage.prompt_tokens_details.cached_tokens

    images = {f"image {number}": picture(300 + number) for number in range(6)}
    assert {cached(image, name) for name, image in images.items()} == {0}
    assert min(cached(image, name) for name, image in images.items()) >= 3 * BLOCK_SIZE
    # One image under many names is computed by both replicas.
    image = picture(299)
    assert [cached(image, f"user {number}") for number in range(20)].count(0) == 2
