"""Endpoints as OpenAI has them, against a server of this process that streams, fails and answers nonsense."""

import http.server
import json
import threading

import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.thumbs.endpoint import Endpoint, open_endpoint
from kto_jax.thumbs.models import Piece, Settings

ASKED = [{"role": "user", "content": "Hello?"}]


def event(content, reason=None):
    return b"data: " + json.dumps({"choices": [{"delta": {"content": content}, "finish_reason": reason}]}).encode()


STREAM = [b": a comment", event(None), event("Hi"), event(" there"), event("", "stop"),
          b'data: {"choices": [], "usage": {}}', b"data: [DONE]"]  # fmt: skip


class Server(http.server.BaseHTTPRequestHandler):
    status, lines, models, seen = 200, STREAM, ["one"], None

    def do_GET(self):
        self._answer([json.dumps({"data": [{"id": name} for name in type(self).models]}).encode()])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen = self.path, body, self.headers.get("Authorization")
        self._answer(type(self).lines)

    def _answer(self, lines):
        content = b"\n\n".join([*lines, b""])
        self.send_response(type(self).status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(monkeypatch):
    kind = type("Own", (Server,), {})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kind, f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def stream(url):
    return list(Endpoint(url, "one").stream(ASKED, Settings(0.5, 32), 7))


def test_an_answer_is_streamed_with_the_settings_and_the_key(served, monkeypatch):
    kind, url = served
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    endpoint = open_endpoint(f"{url}/chat/completions", "")
    assert endpoint == Endpoint(url, "one")
    found = list(endpoint.stream(ASKED, Settings(0.5, 32), 7))
    assert [piece.text for piece in found] == ["Hi", "Hi there", "Hi there"]
    assert found[-1] == Piece("Hi there", 2, True)
    path, body, key = kind.seen
    assert (path, key) == ("/v1/chat/completions", "Bearer a key")
    assert body == {"model": "one", "messages": ASKED, "temperature": 0.5, "max_tokens": 32, "seed": 7, "stream": True}


def test_an_answer_that_was_cut_or_came_whole_is_read(served):
    kind, url = served
    kind.lines = [event("Hi"), event("", "length"), b"data: [DONE]"]
    assert stream(url)[-1] == Piece("Hi", 1, False)
    kind.lines = [b'{"choices": [{"message": {"content": "Whole."}, "finish_reason": "stop"}]}']
    assert stream(url)[-1] == Piece("Whole.", 0, True)


def test_halves_of_characters_are_joined_or_replaced(served):
    kind, url = served
    kind.lines = [event("Hi \ud83d"), event("\ude00 \ude00", "stop"), b"data: [DONE]"]
    assert [piece.text for piece in stream(url)] == ["Hi \ufffd", "Hi 😀 \ufffd", "Hi 😀 \ufffd"]


@pytest.mark.parametrize(("lines", "message"), [
    ([b"data: {"], "sends something that is no answer"),
    ([b"data: [1]"], "sends something that is no answer"),
    ([b'data: {"error": {"message": "overloaded"}}'], "reports an error: .*overloaded"),
])  # fmt: skip
def test_nonsense_is_reported(served, lines, message):
    kind, url = served
    kind.lines = lines
    with pytest.raises(TransientError, match=message):
        stream(url)


@pytest.mark.parametrize(("status", "error", "message"), [
    (401, ConfigError, "wants a key. Set the variable OPENAI_API_KEY"),
    (404, ConfigError, "status 404: .*Check --endpoint"),
    (429, TransientError, "may answer later"),
    (503, TransientError, "may answer later"),
])  # fmt: skip
def test_a_refusal_is_reported(served, status, error, message):
    kind, url = served
    kind.status = status
    with pytest.raises(error, match=message):
        stream(url)
    with pytest.raises(error, match=message):
        open_endpoint(url, "")


def test_a_server_that_is_down_or_unclear_is_reported(served):
    kind, url = served
    with pytest.raises(TransientError, match="cannot be reached, or stopped answering: ConnectError"):
        stream("http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="is no address"):
        open_endpoint("127.0.0.1:8000", "")
    kind.models = ["one", "two"]
    with pytest.raises(ConfigError, match=r"has 2 models: one, two\. .* Set --endpoint_model"):
        open_endpoint(url, "")
    assert open_endpoint(url, "two").name == "two"
