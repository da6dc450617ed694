# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vllm serve` with a policy file whose tasks have layers of their own, and with a guard."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from benchmarks.server import Server, serving
from tests.engine.engines import MODEL, A, Ask, B, assert_follows
from tests.engine.test_server import OPTIONS, chat, message, samples
from tests.search.command import vtw
from tools.dashboard import ALERTS, filled_in, queries
from tools.prometheus import scraping

TASKS = {"yes/no": 2, "ocr": 6, "caption": MODEL.layers}
DEFAULT = 6
SECRET = "chrysanthemum"


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    content = {
        "format": "vllm-vtw-policy/1",
        "model": {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden},
        "stages": [{"layer": 2, "keep": 0}, {"layer": 6, "keep": 0}],
        "ranking": None,
        "gate": None,
        "tasks": TASKS,
    }
    file = Path(tmp_path_factory.mktemp("policy")) / "policy.json"
    file.write_text(json.dumps(content))
    options = json.dumps({"vtw": {"policy": str(file), "guard": {"share": 1}}})
    arguments = (*OPTIONS, f"--additional-config={options}")
    with serving(checkpoint(MODEL), *arguments, env={"VLLM_LOGGING_LEVEL": "DEBUG"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


CHOICES: list[tuple[dict[str, Any], int]] = [
    ({}, DEFAULT),
    ({"vtw_layer": 2}, 2),
    ({"vtw_layer": 6}, 6),
    ({"vtw_layer": MODEL.layers}, MODEL.layers),
    *(({"vtw_task": task}, layer) for task, layer in TASKS.items()),
]


def test_chat_with_a_choice_is_the_reference(client, checkpoint, reference):
    oracle, answers = reference(checkpoint(MODEL)), set()
    for choice, layer in CHOICES:
        answer = chat(client, A, extra_body={"vllm_xargs": choice})
        prompt_ids, output_ids = answer.prompt_token_ids, answer.choices[0].token_ids
        assert_follows(oracle, Ask(str(choice), "", (A,)), prompt_ids, output_ids, layer, align_to=1)
        answers.add(tuple(output_ids))
        stream = chat(client, A, extra_body={"vllm_xargs": choice}, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == answer.choices[0].message.content
    assert len(answers) == 3, "the layers give the same answers"


def test_responses_and_completions_take_a_choice(client):
    model = client.models.list().data[0].id
    (content,) = message(A)
    image, text = content["content"]
    parts = [{"type": "input_image", "image_url": image["image_url"]["url"], "detail": "auto"}]
    asked = [{"role": "user", "content": [*parts, {"type": "input_text", "text": text["text"]}]}]
    for choice, _ in CHOICES[:4]:
        body = {"vllm_xargs": choice, "ignore_eos": True}
        expected = chat(client, A, extra_body=body, max_completion_tokens=16).choices[0].message.content
        options: dict[str, Any] = {"model": model, "input": asked, "temperature": 0, "max_output_tokens": 16}
        answer = client.responses.create(**options, extra_body=body)
        assert answer.output_text == expected
        streamed = client.responses.create(**options, extra_body=body, stream=True)
        deltas = [event.delta for event in streamed if event.type == "response.output_text.delta"]
        assert "".join(deltas) == expected
        text_only = client.completions.create(
            model=model, prompt="USER: What?", extra_body=body, max_tokens=4
        )
        assert text_only.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"vtw_layer": 3}, r"'vtw_layer' = 3: this server offers 2, 6, 8 \(nothing is withdrawn\)"),
        ({"vtw_layer": "2"}, "'vtw_layer' = '2': has to be an integer; this server offers 2, 6, 8"),
        ({"vtw_task": "poetry"}, "'vtw_task' = 'poetry': this server's policy has yes/no, ocr, caption"),
        ({"vtw_task": "ocr", "vtw_layer": 2}, "both choose what is withdrawn: send one of them"),
        ({"vtw_leyer": 2}, "'vtw_leyer': unknown; a request may have 'vtw_layer', 'vtw_task' or 'vtw_keep'"),
    ],
)
def test_a_wrong_choice_gets_400_with_the_reason(client, choice, why):
    model = client.models.list().data[0].id
    body = {"vllm_xargs": choice}
    for ask in (
        lambda: chat(client, B, extra_body=body),
        lambda: chat(client, extra_body=body),
        lambda: client.completions.create(model=model, prompt="What?", extra_body=body),
        lambda: client.responses.create(model=model, input="What?", extra_body=body),
        lambda: chat(client, B, extra_body=body, stream=True),
        lambda: client.completions.create(model=model, prompt="What?", extra_body=body, stream=True),
        lambda: client.responses.create(model=model, input="What?", extra_body=body, stream=True),
    ):
        with pytest.raises(BadRequestError, match=why):
            ask()
    assert chat(client, B).choices[0].token_ids, "the picture of the refused request is missing"


def counted(server: Server) -> dict[str, dict[tuple[str, str], float]]:
    """The plugin's metrics that have a task, by name, then by layer and task."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for sample in samples(server):
        if "task" in sample.labels and "le" not in sample.labels:
            of = (sample.labels["layer"], sample.labels["task"])
            found.setdefault(sample.name.removeprefix("vllm:vtw_"), {})[of] = sample.value
    return found


def read_again(server: Server, wanted: set[tuple[str, str]], before: dict[tuple[str, str], float]) -> Any:
    """The metrics, once the guard has read answers of all of these layers and tasks."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        now = counted(server)
        read = now.get("guard_requests_total", {})
        if all(read.get(of, 0) > before.get(of, 0) for of in wanted):
            return now
        time.sleep(0.2)
    raise AssertionError(f"not read: {read}")


def test_the_guard_on_metrics_and_in_the_terminal(client, server):
    before = counted(server).get("guard_requests_total", {})
    for task in (*TASKS, None):
        body = {"vllm_xargs": {"vtw_task": task} if task else {}}
        chat(client, A, extra_body=body)
    now = read_again(server, {("2", "yes/no"), ("6", "ocr"), ("6", "")}, before)
    read = now["guard_requests_total"]
    assert not any(layer == "8" for layer, _ in read), "there is nothing to read"
    assert {("8", "caption")} | read.keys() <= now["requests_total"].keys()
    for of in read:
        assert now["guard_tokens_total"][of] == now["guard_logprob_difference_count"][of] > 0
        assert now["guard_greedy_tokens_total"][of] == now["guard_tokens_total"][of]
    changed = now["guard_changed_tokens_total"]
    assert changed["2", "yes/no"] > 0

    result = vtw("guard", server.url, "--json")
    assert result.status == 1
    (model,) = json.loads(result.out)["models"]
    rows = {(row["task"], row["layer"]): row for row in model["answers"]}
    assert rows["yes/no", 2]["changed_tokens"] >= changed["2", "yes/no"]
    assert rows["yes/no", 2]["verdict"] == "too shallow"
    table = vtw("guard", server.url)
    assert re.search(r"yes/no +2 +\d+ +\d+ ", table.out), table.out


def test_the_dashboard_shows_the_guard(client, server):
    chat(client, A)
    read_again(server, {("6", "")}, {})
    shown = set(re.findall(r"vllm:\w+", " ".join(queries())))
    there = {sample.name for sample in samples(server)}
    guards = {name for name in shown if name.startswith("vllm:vtw_guard_")}
    assert guards - {"vllm:vtw_guard_left_out_total"} <= there


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's package `prometheus` has it")
def test_prometheus_answers_the_dashboard_and_the_alert(client, server):
    of, body = ("2", "yes/no"), {"vllm_xargs": {"vtw_task": "yes/no"}}
    # What grows before Prometheus has seen a counter for the first time is not an increase to it.
    chat(client, A, extra_body=body)
    read_again(server, {of}, {})
    with scraping(server.url, ALERTS) as prometheus:
        with ThreadPoolExecutor() as pool:
            long = {"extra_body": body, "max_completion_tokens": 380}
            list(pool.map(lambda image: chat(client, image, **long), (A, B)))
        deadline = time.monotonic() + 30
        while not (alerts := prometheus.get("alerts")["alerts"]) and time.monotonic() < deadline:
            time.sleep(0.2)
        empty = [query for query in queries() if not prometheus.query(filled_in(query, "10s"))]
    (alert,) = alerts
    assert alert["state"] == "pending", "it fires after half an hour"
    assert (alert["labels"]["layer"], alert["labels"]["task"]) == of
    assert "Withdrawing visual tokens at layer 2 changes " in alert["annotations"]["summary"]
    of_others = "vllm:vtw_exit_layer_bucket", "vllm:vtw_guard_left_out_total"
    assert set(re.findall(r"vllm:\w+", " ".join(empty))) <= {*of_others}, "of gates, and of a busy guard"


def test_words_of_requests_are_not_logged(client, server):
    """Neither as text nor as ids, not even at the level of debugging."""
    model = client.models.list().data[0].id
    (content,) = message(A)
    content["content"][1]["text"] = f"Is this a {SECRET}?"
    before = counted(server).get("guard_requests_total", {})
    answer = client.chat.completions.create(
        model=model,
        messages=[content],
        max_completion_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"vtw_task": "ocr"}},
    )
    read_again(server, {("6", "ocr")}, before)
    log = server.log()
    assert "of task 'ocr' chose that its visual tokens leave at layer 6" in log
    ids = answer.choices[0].token_ids
    for words in (SECRET, ", ".join(map(str, ids)), " ".join(map(str, ids))):
        assert words not in log
        assert words not in server.metrics_page()
