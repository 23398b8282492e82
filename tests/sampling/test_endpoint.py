"""Completions of a server, which here is a thread of the test that answers what a script says."""

import http.server
import json
import threading

import numpy as np
import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.data.tokens.tokenizer import decode
from kto_jax.sampling.complete import LanguageModel, open_language_model
from kto_jax.sampling.endpoint import TOKEN, SamplingEndpoint
from kto_jax.sampling.sample import Sampling
from tests.sampling.openai_server import serve
from tests.sampling.tiny import TINY

PROMPTS = ["Name a film.", "Name a river, please."]
SAMPLING = Sampling(1.0, 1.0, 0, 3)


class Server(http.server.ThreadingHTTPServer):
    """Answers each prompt with its first ids, after the answers that `script` lists first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script, self.asked, self.headers, self.lock = [], [], [], threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.headers.append(self.headers)
            status, answer = self.server.script.pop(0) if self.server.script else (200, None)
        answer = {"choices": [choice(body["prompt"][:3], i) for i in (1, 0)]} if answer is None else answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        pass


def choice(ids, index=0, reason="length", **change):
    logps = [-0.5 - index] * len(ids)
    return {"index": index, "token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": logps}} | change


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(Server()) as running:
        yield running


@pytest.fixture(scope="module")
def model():
    def load():
        raise AssertionError("no parameters are read")

    with open_language_model(str(TINY)) as opened:
        yield LanguageModel(opened.model, opened.tokenizer, load, opened.workers)


def complete(model, server, tmp_path, num_samples=2, wait=lambda seconds: None):
    endpoint = SamplingEndpoint(server.url, "policy", wait)
    return endpoint.complete(model, PROMPTS, SAMPLING, num_samples=num_samples, record=tmp_path / "record.jsonl")


def test_ids_go_in_and_come_out_with_their_log_probabilities(model, server, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    found = complete(model, server, tmp_path)
    assert [completion.prompt for completion in found] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    asked = {tuple(body["prompt"]): body for path, body in server.asked if path == "/v1/completions"}
    for completion, logp in zip(found, [-0.5, -1.5] * 2, strict=True):
        assert completion.prompt_ids in asked and completion.ids == completion.prompt_ids[:3]
        assert completion.logps == (logp,) * 3 and not completion.ended and completion.text
    body = asked[found[0].prompt_ids]
    expected = {"model": "policy", "n": 2, "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
                "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}  # fmt: skip
    assert body | expected == body
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_an_eos_ends_a_completion(model, server, tmp_path):
    eos = model.tokenizer.eos_id
    server.script += [(200, {"choices": [choice([5, eos], reason="stop")]})] * 2
    assert [one.ended for one in complete(model, server, tmp_path, 1)] == [True, True]


def test_failures_that_may_pass_are_tried_again_and_answers_are_kept(model, server, tmp_path):
    waits = []
    server.script += [(503, {}), (429, {})]
    whole = complete(model, server, tmp_path, wait=waits.append)
    assert len(server.asked) == 4 and len(waits) == 2
    assert complete(model, server, tmp_path) == whole and len(server.asked) == 4

    lines = [line for line in (tmp_path / "record.jsonl").read_text().splitlines() if line]
    (tmp_path / "record.jsonl").write_text(f"{lines[0]}\n{lines[1][:-9]}")  # killed while it wrote the second
    assert complete(model, server, tmp_path) == whole and len(server.asked) == 5
    assert complete(model, server, tmp_path) == whole and len(server.asked) == 5, "kept behind the torn line"


def test_a_server_that_is_down_is_worth_another_try_of_the_run(model, server, tmp_path):
    server.script += [(500, {})] * 20
    with pytest.raises(TransientError, match=r"answered 500 .* asked 5 times. The completions so far are kept"):
        complete(model, server, tmp_path)


@pytest.mark.parametrize("status, answer, what", [
    (404, {}, "answered 404"),
    (200, {"choices": [{"index": 0, "text": "Hello"}]}, "answered b'"),
    (200, {"choices": []}, "answered 0 completions of 1"),
    (200, {"choices": [choice([])]}, "0 tokens with 0 log-prob"),
    (200, {"choices": [choice([5, 6, 7, 8])]}, "4 tokens with 4 log-probabilities, of at most 3"),
    (200, {"choices": [choice([5, 6], logprobs={"token_logprobs": [-1.0]})]}, "2 tokens with 1"),
    (200, {"choices": [choice([5, 10**6])]}, "a token that is none of the model's"),
    (200, {"choices": [choice([5], logprobs={"token_logprobs": [0.7]})]}, "no log-probability"),
    (200, {"choices": [choice([5], logprobs={"token_logprobs": [None]})]}, "no log-probability"),
    (200, {"choices": [choice([5], reason="stop")]}, "finish_reason 'stop' that ends in token 5"),
])  # fmt: skip
def test_an_answer_that_cannot_be_trained_on_is_refused(model, server, tmp_path, status, answer, what):
    server.script += [(status, answer)] * 2
    with pytest.raises(ConfigError, match=what):
        complete(model, server, tmp_path, 1)


def test_an_eos_in_the_middle_is_refused(model, server, tmp_path):
    server.script += [(200, {"choices": [choice([model.tokenizer.eos_id, 5])]})] * 2
    with pytest.raises(ConfigError, match="that ends in token 5"):
        complete(model, server, tmp_path, 1)


def test_text_is_decoded_here(model, server, tmp_path):
    server.script += [(200, {"choices": [choice([70, 71], text="something else")]})] * 2
    expected = decode(model.tokenizer, np.array([70, 71]))
    assert [one.text for one in complete(model, server, tmp_path, 1)] == [expected, expected]
