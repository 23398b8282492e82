"""A stand-in for the Hub's HTTP interface: repositories whose branches move, served on the loopback interface."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

_API = re.compile(r"/api/(models|datasets)/(org/name)(?:/(revision|tree)/([^/?]+))?")
_FILE = re.compile(r"(?:/datasets)?/(org/name)/resolve/([^/]+)/(.+)")


@dataclasses.dataclass
class Hub:
    """The repository org/name.

    Attributes:
      url: of the server.
      commits: files of each commit, by its hash.
      refs: commit of each branch and tag.
      requests: method and path of every request, in order.
      status: answer everything with this HTTP status; 0 answers as the Hub does.
    """

    url: str = ""
    commits: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    requests: list[str] = dataclasses.field(default_factory=list)
    status: int = 0

    def commit(self, files: dict[str, str], *refs: str) -> str:
        """Adds a commit to which the refs then point; returns its hash."""
        digest = hashlib.sha1(json.dumps([files, len(self.commits)]).encode()).hexdigest()
        self.commits[digest] = files
        self.refs |= dict.fromkeys(refs or ("main",), digest)
        return digest


@contextlib.contextmanager
def serve_hub():
    """Serves a Hub while the body runs."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, body, headers = (hub.status, b"", {}) if hub.status else answer(hub, path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def answer(hub: Hub, path: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers."""
    if match := _API.fullmatch(path):
        commit = hub.refs.get(match[4] or "main", match[4] or "")
        if commit not in hub.commits:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        files = hub.commits[commit]
        if match[3] == "tree":
            tree = [{"type": "file", "path": n, "size": len(t), "oid": _etag(t)} for n, t in files.items()]
            return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
        info = {"id": match[2], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
    match = _FILE.fullmatch(path)
    commit = hub.refs.get(match[2], match[2]) if match else ""
    if commit not in hub.commits:
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
    if match[3] not in hub.commits[commit]:
        return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
    text = hub.commits[commit][match[3]]
    return 200, text.encode(), {"ETag": f'"{_etag(text)}"', "X-Repo-Commit": commit}


def _etag(text: str) -> str:
    return hashlib.sha1(f"blob {len(text)}\0{text}".encode()).hexdigest()
