"""A proxy on this machine in front of a server of buckets, which answers as it is told: with errors, slowly, or not."""

import contextlib
import http.client
import http.server
import json
import threading

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "trailer", "upgrade"}


class UnsteadyProxy:
    """Passes requests on to a server, or does what `mode` says.

    Attributes:
      mode: "pass", a status such as 503, "slow" (an answer takes `seconds`), "silent" (no answer) or "reset" (the
        connection is closed).
      seconds: of a slow answer.
      url: of the proxy.
      failed: number of requests that were not passed on.
    """

    def __init__(self, seconds=1.0):
        self.mode, self.seconds, self.failed, self.upstream = "pass", seconds, 0, ""
        self._steady = threading.Event()
        self._counted = threading.Condition()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None  # Clients are killed in mid-request.
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.set("pass")
        self._server.shutdown()
        self._server.server_close()

    def set(self, mode):
        """Changes the mode; requests that wait for an answer get none."""
        self.mode = mode
        waiting, self._steady = self._steady, threading.Event()
        waiting.set()

    def count(self):
        with self._counted:
            self.failed += 1
            self._counted.notify_all()

    def wait_for_failures(self, number, timeout=240):
        """Waits until this many more requests have not been passed on."""
        with self._counted:
            wanted = self.failed + number
            return self._counted.wait_for(lambda: self.failed >= wanted, timeout)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy = None

    def log_message(self, *arguments):
        pass

    def _answer(self):
        body, steady, mode = self._body(), self.proxy._steady, self.proxy.mode
        if mode == "pass":
            self._pass_on(body)
            return
        self.proxy.count()
        if mode == "slow":
            steady.wait(self.proxy.seconds)
            self._pass_on(body)
        elif isinstance(mode, int):
            self._send(mode, [], json.dumps({"error": {"code": mode, "message": "the proxy fails"}}).encode())
        else:
            if mode == "silent":
                steady.wait()
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _pass_on(self, body):
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        with contextlib.closing(http.client.HTTPConnection(self.proxy.upstream.partition("://")[2], timeout=60)) as to:
            to.request(self.command, self.path, body, headers)
            answer = to.getresponse()
            content = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._send(answer.status, kept, content, length)

    def _send(self, status, headers, content, length=None):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
