"""Rewards from a server, which here is a thread of the test."""

import http.server
import json
import threading

import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.rewards.endpoint import TOKEN, Endpoint
from kto_jax.rewards.functions import open_rewards, total_rewards
from tests.rewards.test_functions import SCORED


class Server(http.server.ThreadingHTTPServer):
    """Gives each completion its length, after the answers that `script` lists first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        self.script, self.asked, self.headers, self.lock = [], [], [], threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(self.headers)
            status, answer = self.server.script.pop(0) if self.server.script else (200, None)
        answer = {"rewards": [len(text) for text in body["completions"]]} if answer is None else answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def row(text):
    return {"prompt": "Q?", "completion": text, "ended": True, "num_tokens": 1, "columns": {"answer": 3}}


def test_it_is_a_reward_by_its_url_and_gets_what_functions_get(server, monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    with open_rewards([f"{server.url} * 0.5"]) as rewards:
        sums, alone = total_rewards(rewards, SCORED, 60)
    assert sums == [0.5, 1.0, 1.5] and alone == {server.url: [1.0, 2.0, 3.0]}
    (asked,) = server.asked
    assert asked == {
        "prompts": ["a?", "b?", "c?"], "completions": ["x", "yy", "zzz"], "ended": [True, False, True],
        "num_tokens": [2, 2, 2], "columns": {"answer": [1, 2, None]},
    }  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_many_rows_are_several_requests_and_answers_keep_their_order(server):
    texts = ["x" * (1 + number % 40) for number in range(100)]
    assert Endpoint(server.url).rewards([row(text) for text in texts], None) == [len(text) for text in texts]
    assert sorted(len(asked["prompts"]) for asked in server.asked) == [8, 16, 16], "equal rows are asked for once"


def test_failures_that_may_pass_are_tried_again(server):
    waited = []
    server.script = [(503, {}), (429, {})]
    assert Endpoint(server.url, waited.append).rewards([row("ab")], None) == [2]
    assert waited == [1.0, 2.0] and len(server.asked) == 3


def test_a_resumed_run_asks_for_no_answer_twice(server, tmp_path):
    record = tmp_path / "round" / "rollout.answers.jsonl"
    rows = [row("x" * number) for number in range(1, 41)]
    server.script = [(200, None), (200, None), (400, {})]
    with pytest.raises(ConfigError, match="answered 400"):
        Endpoint(server.url).rewards(rows, record)
    kept = len(server.asked) - 1
    with record.open("a") as file:
        file.write('{"torn')
    server.asked.clear()
    assert Endpoint(server.url).rewards(rows, record) == list(range(1, 41))
    assert kept == 2 and sum(len(asked["prompts"]) for asked in server.asked) < 40
    server.asked.clear()
    assert Endpoint(server.url).rewards(rows, record) == list(range(1, 41)) and not server.asked


def test_a_server_that_is_down_is_worth_another_try_of_the_run(server):
    server.script = [(500, {})] * 9
    with pytest.raises(TransientError, match=r"answered 500 .*asked 5 times.*Run the same command again"):
        Endpoint(server.url, lambda seconds: None).rewards([row("a")], None)
    assert len(server.asked) == 5
    server.server_close()
    with pytest.raises(TransientError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:1/score", lambda seconds: None).rewards([row("a")], None)


@pytest.mark.parametrize("status, answer, what", [
    (404, {}, "answered 404"),
    (200, {"scores": [1]}, "answered b'"),
    (200, {"rewards": [1, 2]}, "answered 2 rewards for 1 completions"),
    (200, {"rewards": ["good"]}, "answered 'good'"),
    (200, {"rewards": [float("nan")]}, "answered nan"),
    (200, {"rewards": [True]}, "answered True"),
])  # fmt: skip
def test_an_answer_that_is_no_reward_is_refused(server, status, answer, what):
    server.script = [(status, answer)]
    with pytest.raises(ConfigError, match=what + r".*Correct the server"):
        Endpoint(server.url).rewards([row("a")], None)


def test_a_server_may_say_that_a_reward_does_not_apply(server):
    server.script = [(200, {"rewards": [None]})]
    assert Endpoint(server.url).rewards([row("a")], None) == [None]
