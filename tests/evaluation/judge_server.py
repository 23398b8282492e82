"""A server on this machine that plays a language model as judge."""

import http.server
import json
import threading

import pytest


class Server(http.server.ThreadingHTTPServer):
    """Answers as OpenAI's chat API does, by a function of the question's text."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.questions, self.headers, self.lock = reply, [], [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.questions.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.questions)
        found = self.server.reply(self.path, body["messages"][1]["content"], number)
        status, content = found if isinstance(found, tuple) else (200, found)
        reply = (
            content
            if isinstance(content, bytes)
            else json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts servers; answers are cached in a folder of the test."""
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(reply):
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def longer_wins(path, text, number):
    a, b = (text.split(f"<answer_{name}>\n")[1].split("\n</answer")[0] for name in "AB")
    return f"Let me see. [[{'A>B' if len(a) > len(b) else 'B>A' if len(b) > len(a) else 'A=B'}]]"
