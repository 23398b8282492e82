"""A server as vLLM is: token ids in, token ids and log-probabilities out, sampled by our own sampler."""

import contextlib
import http.server
import json
import threading

import jax
import numpy as np

from kto_jax.sampling.complete import open_language_model
from kto_jax.sampling.sample import Sampling, sample_with_logps


class Server(http.server.ThreadingHTTPServer):
    """Samples from the policy in a folder, until another one is sent to /load.

    Attributes:
      url: its base.
      loaded: the folders so far.
      asked: the bodies of the requests for completions.
      shift: added to the log-probabilities.
    """

    def __init__(self, path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.loaded, self.asked, self.shift, self.lock = [path], [], 0.0, threading.Lock()

    def choices(self, body):
        with self.lock, open_language_model(self.loaded[-1]) as opened:
            self.asked.append(body)
            eos_ids = sorted({*opened.tokenizer.stop_ids, *opened.model.config.eos_ids})
            drawn = sample_with_logps(
                opened.model, opened.decoding_params, [np.asarray(body["prompt"], np.int32)] * body["n"],
                Sampling(body["temperature"], max_new_tokens=body["max_tokens"]), eos_id=eos_ids,
                key=jax.random.key(sum(body["prompt"])), batch_size=body["n"],
            )  # fmt: skip
        # In any order: each has its index.
        return [
            {"index": i, "token_ids": x.ids.tolist(), "finish_reason": "stop" if x.ids[-1] in eos_ids else "length",
             "text": "", "logprobs": {"token_logprobs": [float(y) + self.shift for y in x.logps]}}
            for i, x in reversed(list(enumerate(drawn)))
        ]  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/load":
            self.server.loaded.append(content.decode())
            answer = {}
        else:
            assert self.path == "/v1/completions"
            answer = {"choices": self.server.choices(json.loads(content))}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serve(server):
    """Runs a server in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
