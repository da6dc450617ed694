# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw guard` against servers on this machine, which send the metrics of a vLLM server or something else."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_vtw.commands import metrics_page
from vllm_vtw.commands.cli import main
from vllm_vtw.commands.guard_counts import guard_counts
from vllm_vtw.commands.metrics_page import metrics_url

LLAVA, OTHER = "llava-hf/llava-1.5-7b-hf", "other"
GUARD_OFF = 'this server\'s guard is off: set "guard": {"share": 0.01} under "vtw" in --additional-config'
LABELS = ["model_name", "engine", "layer", "task"]


class Metrics:
    """The metrics of a server, as vLLM and the plugin make them."""

    def __init__(self, vtw: bool = True, guard: bool = True) -> None:
        self.registry = CollectorRegistry()
        running = Gauge("vllm:num_requests_running", "Running.", LABELS[:2], registry=self.registry)
        running.labels(LLAVA, "0").set(3)
        if vtw:
            self.requests = self.counter("vllm:vtw_requests", LABELS)
        if guard:
            self.left_out = self.counter("vllm:vtw_guard_left_out", [*LABELS[:2], "reason"])
            names = ("requests", "tokens", "greedy_tokens", "changed_tokens")
            self.counters = [self.counter(f"vllm:vtw_guard_{name}", LABELS) for name in names]
            buckets = (0.001, 0.01, 0.1, 0.5, 1, 2, 5)
            name = "vllm:vtw_guard_logprob_difference"
            self.difference = Histogram(name, "Nats.", LABELS, buckets=buckets, registry=self.registry)

    def counter(self, name: str, labels: list[str]) -> Counter:
        return Counter(name, "A number.", labels, registry=self.registry)

    def read_again(
        self, layer, task, *, requests=10, greedy=1000, changed=0, nats=(0.5,), model=LLAVA, engine="0"
    ) -> None:
        labels = (model, engine, str(layer), task)
        self.requests.labels(*labels).inc(100 * requests)
        for counter, value in zip(self.counters, (requests, greedy + 7, greedy, changed), strict=True):
            counter.labels(*labels).inc(value)
        for value in nats:
            self.difference.labels(*labels).observe(value)

    def page(self) -> bytes:
        return generate_latest(self.registry)


Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """A function that starts a server which answers as told, and returns its URL."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_) -> None:
                """Keeps the tests' output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sends(page: bytes, path: str = "/metrics") -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200 if handler.path == path else 404)
        handler.end_headers()
        handler.wfile.write(page)

    return answer


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., tuple[int, str]]:
    """A function that runs the command, and returns its exit status and what it prints."""

    def run_command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vtw", "guard", *arguments])
        status: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        assert isinstance(status, int)
        return status, printed.out + printed.err

    return run_command


@pytest.fixture
def shown(run, serve) -> Callable[..., tuple[int, str]]:
    """A function that runs the command for a server with the given metrics."""
    return lambda metrics, *arguments: run(serve(sends(metrics.page())), *arguments)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://host:8000", "http://host:8000/metrics"),
        ("http://host:8000/", "http://host:8000/metrics"),
        ("http://host:8000/metrics", "http://host:8000/metrics"),
        ("http://host:8000/metrics/", "http://host:8000/metrics"),
        ("https://host/vllm", "https://host/vllm/metrics"),
        ("host:8000", "http://host:8000/metrics"),
        ("host:8000/metrics", "http://host:8000/metrics"),
        ("[::1]:8000", "http://[::1]:8000/metrics"),
    ],
)
def test_urls(given, url):
    assert metrics_url(given) == url


def test_the_table(shown):
    metrics = Metrics()
    metrics.read_again(16, "ocr", requests=120, greedy=4100, changed=180, nats=(0.1, 0.3))
    metrics.read_again(16, "ocr", requests=120, greedy=4100, changed=180, nats=(0.2, 0.2), engine="1")
    metrics.read_again(8, "vqa", greedy=4400, changed=6, nats=(0.0031,))
    metrics.read_again(16, "vqa", greedy=1, nats=())
    metrics.read_again(20, "caption", greedy=620, changed=4)
    metrics.read_again(16, "", greedy=0, nats=(7,))
    metrics.requests.labels(LLAVA, "0", "32", "").inc(900)
    metrics.left_out.labels(LLAVA, "0", "queue_full").inc(12)
    metrics.left_out.labels(LLAVA, "1", "queue_full").inc(1000)
    metrics.left_out.labels(LLAVA, "0", "no_room").inc(0)
    metrics.left_out.labels(LLAVA, "0", "too_long").inc(1)
    status, printed = shown(metrics)
    assert status == 1
    name, *rows, blank, budget, _, requests, left_out, advice = printed.splitlines()
    assert name == LLAVA
    verdicts = ("verdict", "no greedy answers", "unclear", "too shallow", "fine", "unclear")
    assert len({row.index(verdict) for row, verdict in zip(rows, verdicts, strict=True)}) == 1  # they line up
    assert [" ".join(row.split()) for row in rows] == [
        "task layer read again greedy tokens changed (95% interval) nats apart verdict",
        "- 16 10 0 - 7 no greedy answers",
        "caption 20 10 620 0.65% (0.25% to 1.65%) 0.5 unclear: about 1,800 more greedy tokens would tell",
        "ocr 16 240 8,200 4.39% (3.97% to 4.86%) 0.2 too shallow",
        "vqa 8 10 4,400 0.14% (0.06% to 0.30%) 0.0031 fine",
        "vqa 16 10 1 0.00% (0.00% to 79.35%) - unclear: about 380 more greedy tokens would tell",
    ]
    assert not blank
    assert budget.startswith("At most 1% of greedy tokens may change")
    assert requests == "Requests: 28,900 in all, 280 read again."
    assert left_out == (
        "Left out: 1,013 (1,012 because the guard's queue was full, 1 because they are too long)."
    )
    assert advice == (
        "Use a larger K for task ocr: `vtw calibrate MODEL --data FILE --per-task` finds one for each task, "
        "on samples like these requests."
    )
    assert len(printed.splitlines()) <= 24  # one screen


def test_json_has_the_same(shown):
    metrics = Metrics()
    metrics.read_again(16, "ocr", greedy=1000, changed=10, nats=(0.25, 0.75))
    metrics.read_again(16, "", greedy=0, nats=(float("inf"),))
    metrics.left_out.labels(LLAVA, "0", "no_room").inc(3)
    status, printed = shown(metrics, "--json")
    assert status == 0
    result = json.loads(printed)
    (model,) = result["models"]
    none, ocr = model.pop("answers")
    assert result["max_token_change"] == 0.01
    assert model.pop("advice").startswith("Nothing is too shallow so far")
    assert model == {"model": LLAVA, "requests": 2000, "read_again": 20, "left_out": {"no_room": 3}}
    assert ocr.pop("interval") == pytest.approx([0.00544, 0.01831], abs=1e-5)
    assert ocr == {
        "task": "ocr",
        "layer": 16,
        "read_again": 10,
        "tokens": 1007,
        "greedy_tokens": 1000,
        "changed_tokens": 10,
        "token_change": 0.01,
        "compared_tokens": 2,
        "mean_difference": 0.5,
        "verdict": "unclear",
        "more_greedy_tokens": 2842,
    }
    assert none["verdict"] == "no greedy answers"
    for key in ("token_change", "interval", "mean_difference", "more_greedy_tokens"):
        assert none[key] is None


def test_the_budget_decides(shown):
    metrics = Metrics()
    metrics.read_again(16, "ocr", greedy=1000, changed=50)
    assert shown(metrics)[0] == 1
    status, printed = shown(metrics, "--max-token-change", "0.2")
    assert status == 0
    assert "fine" in printed
    assert "At most 20% of greedy tokens" in printed
    for budget in ("0", "1", "1e-9", "nan", "x"):
        status, printed = shown(metrics, "--max-token-change", budget)
        assert status == 2
        assert f"'{budget}' is not a" in printed


def test_the_help_names_the_exit_statuses(run):
    status, printed = run("--help")
    assert status == 0
    assert "the exit status is 1 if a layer is too shallow for a task, 2 after an error" in " ".join(
        printed.split()
    )


def test_a_block_for_each_model(shown):
    metrics = Metrics()
    metrics.read_again(16, "", greedy=9000, model=OTHER)
    metrics.read_again(16, "", greedy=9000, changed=900)
    metrics.left_out.labels(OTHER, "0", "no_room").inc(5)
    status, printed = shown(metrics)
    assert status == 1
    first, second = printed.split(f"\n\n{OTHER}\n")
    assert first.startswith(LLAVA)
    assert "too shallow" in first
    assert "Left out: 0.\n" in first
    assert "fine" in second
    assert "Left out: 5 (5 because users' requests needed the room)." in second


def advice(shown, metrics: Metrics) -> str:
    return shown(metrics)[1].splitlines()[-1]


def test_advice_if_requests_name_no_task(shown):
    metrics = Metrics()
    metrics.read_again(8, "", changed=500)
    metrics.read_again(16, "", changed=400)
    assert advice(shown, metrics).startswith(
        "Use a larger K than 8 and 16: `vtw calibrate MODEL --data FILE`"
    )


def test_advice_for_many_tasks(shown):
    metrics = Metrics()
    for task in ("", "a", "b", "c", "d", "e", "f"):
        metrics.read_again(8, task, changed=500)
    named = "requests without a task, task a, task b, task c, task d and 2 more"
    assert advice(shown, metrics).startswith(f"Use a larger K for {named}:")


def test_advice_under_gates(shown):
    metrics = Metrics()
    metrics.read_again(8, "", changed=500)
    Histogram("vllm:vtw_exit_layer", "Layers.", LABELS[:2], registry=metrics.registry)
    assert advice(shown, metrics).startswith("Raise the thresholds of the policy's gates: at layer 8,")


def test_advice_under_a_ranking(shown):
    metrics = Metrics()
    metrics.read_again(8, "", changed=500, nats=())
    assert "`vtw gsearch MODEL --data FILE`" in advice(shown, metrics)


def test_advice_if_nothing_is_too_shallow(shown):
    metrics = Metrics()
    metrics.requests.labels(LLAVA, "0", "16", "").inc(9)
    assert advice(shown, metrics).startswith("No answer has been read again yet")
    metrics.read_again(16, "sampled", greedy=0)
    assert advice(shown, metrics).startswith("Only greedy answers can be judged")
    metrics.read_again(16, "few", greedy=5)
    assert advice(shown, metrics).startswith("Nothing is too shallow so far")
    metrics = Metrics()
    metrics.read_again(16, "ocr", greedy=5000)
    assert advice(shown, metrics) == "Visual tokens leave late enough for what is asked here."


def test_a_server_without_requests(shown):
    assert shown(Metrics()) == (0, "No request has arrived at this server yet.\n")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"<html>vllm:vtw_ is not at the start of a line</html>", "this is not a vLLM server"),
        (b"\xff\xfe\x00", "this is not a vLLM server"),
        (b"", "this is not a vLLM server"),
        (Metrics(vtw=False, guard=False).page(), "this vLLM server runs without --model-impl vtw"),
        (Metrics(guard=False).page(), GUARD_OFF),
    ],
)
def test_servers_without_a_guard(run, serve, page, message):
    status, printed = run(serve(sends(page)))
    assert status == 2
    assert printed.startswith(f"vtw guard: error: {message}")
    assert printed.count("\n") == 1


SAMPLE = b'vllm:vtw_guard_%s{layer="%s",task="\\n\x1b[2J"} %s'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SAMPLE % (b"requests_total", b"16", b"NaN"), "vllm:vtw_guard_requests_total is nan"),
        (SAMPLE % (b"requests_total", b"16", b"+Inf"), "vllm:vtw_guard_requests_total is inf"),
        (SAMPLE % (b"requests_total", b"16", b"-1"), "vllm:vtw_guard_requests_total is -1"),
        (SAMPLE % (b"tokens_total", b"16", b"9" * 400), "vllm:vtw_guard_tokens_total is 999"),
        (SAMPLE % (b"logprob_difference_sum", b"16", b"NaN"), "vllm:vtw_guard_logprob_difference_sum is nan"),
        (SAMPLE % (b"logprob_difference_sum", b"16", b"9" * 400), "_sum is 999"),
        (SAMPLE % (b"requests_total", b"16x", b"1"), "they have a layer '16x'"),
        (SAMPLE % (b"requests_total", b"9" * 5000, b"1"), "a line of more than 4096 characters"),
        (SAMPLE % (b"requests_total", b"16", b"9" * 4000), "is 9999"),
        (SAMPLE % (b"changed_tokens_total", b"16", b"1"), r"layer 16, task '\n\x1b[2J', 1 changed"),
        (b"vllm:vtw_guard_requests_total{layer=1} 1", "the server's metrics cannot be read"),
        (b"vllm:vtw_guard_requests_total", "the server's metrics cannot be read"),
    ],
)
def test_broken_metrics(run, serve, line, message):
    status, printed = run(serve(sends(Metrics().page() + line + b"\n")))
    assert status == 2
    assert message in printed
    assert printed.endswith("\n")
    assert printed[:-1].isprintable()
    assert len(printed) < 400


def test_texts_of_the_server_are_shown_safely(shown):
    metrics, bad = Metrics(), "a\x1b[31m\x9b\u202e" * 30
    metrics.read_again(16, bad, changed=500, model=bad)
    metrics.left_out.labels(bad, "0", bad).inc(1)
    status, printed = shown(metrics)
    assert status == 1
    assert printed.replace("\n", "").isprintable()
    assert bad not in printed


def lines_of(names: list[str]) -> st.SearchStrategy[str]:
    pieces = [
        *names,
        "# TYPE ",
        "# HELP ",
        *'{}=,"\\ \t\n',
        'layer="1"',
        "1",
        "-",
        "NaN",
        " counter",
        " histogram",
    ]
    return st.lists(st.sampled_from(pieces), max_size=30).map("".join)


@given(lines_of(["vllm:vtw_guard_requests_total", "vllm:vtw_guard_logprob_difference_sum", "vllm:vtw_x"]))
def test_any_page_is_read_or_refused(page):
    message = ""
    try:
        guard_counts("vllm:vtw_guard_x 1\n" + page)
    except ValueError as error:
        message = str(error)
    assert message.isprintable()


def test_no_server(run, serve):
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    url = f"127.0.0.1:{server.server_port}"
    message = f"vtw guard: error: cannot connect to http://{url}/metrics: Connection refused\n"
    assert run(url) == (2, message)


def test_an_http_error(run, serve):
    url = serve(sends(b"", "/elsewhere"))
    assert run(url) == (2, f"vtw guard: error: {url}/metrics answers with HTTP status 404\n")


def redirects(target: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


def test_redirects(run, serve):
    metrics = Metrics()
    metrics.read_again(16, "ocr")
    url = serve(sends(metrics.page()))
    status, printed = run(serve(redirects(f"{url}/metrics")))
    assert "ocr" in printed
    assert status == 0


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1:1/", "data:,vllm:vtw_guard_x", "/metrics"]
)
def test_redirects_that_are_not_followed(run, serve, target):
    status, printed = run(serve(redirects(target)))
    assert status == 2
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://a:b", "http://", "http://[::1", "http://h/\x1b[2J", "é/é", ""]
)
def test_wrong_urls(run, url):
    status, printed = run(url)
    assert status == 2
    assert printed[:-1].isprintable()
    assert printed.startswith("vtw guard: error: ")


def test_no_http_server(run, serve):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-\x1b[31m\r\n")

    status, printed = run(serve(answer))
    assert status == 2
    assert "BadStatusLine" in printed
    assert printed[:-1].isprintable()


def test_a_large_page(run, serve, monkeypatch):
    metrics = Metrics()
    metrics.read_again(16, "ocr")
    url = serve(sends(metrics.page()))
    monkeypatch.setattr(metrics_page, "MAX_BYTES", len(metrics.page()))
    assert run(url)[0] == 0
    monkeypatch.setattr(metrics_page, "MAX_BYTES", len(metrics.page()) - 1)
    status, printed = run(url)
    assert status == 2
    assert "MiB that are read" in printed


def drips(handler: BaseHTTPRequestHandler) -> None:
    """Sends a header for a second, in pieces that no socket's timeout would mind."""
    handler.send_response(200)
    handler.flush_headers()
    for _ in range(50):
        handler.wfile.write(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize("answer", [drips, lambda _: time.sleep(1)], ids=["drips", "silent"])
def test_a_slow_server(run, serve, monkeypatch, answer):
    monkeypatch.setattr(metrics_page, "TIMEOUT", 0.2)
    url, start = serve(answer), time.monotonic()
    assert run(url) == (2, f"vtw guard: error: {url}/metrics takes more than 0.2 seconds\n")
    assert time.monotonic() - start < 0.9


def test_without_prometheus_client(shown, monkeypatch):
    metrics = Metrics()
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    status, printed = shown(metrics)
    assert status == 2
    assert printed.endswith(": install prometheus_client, which comes with vLLM\n")
