"""launch/vllm_restart.sh: one server at a time, which samples from the folder that was handed over last.

The server here is a program that answers /health; the script was tried with vLLM 0.32 itself (docs/online.md).
"""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.launch.machine import alive

SERVER = f"""#!{sys.executable} -S
import http.server, os, sys
with open("started", "a") as file:
    print(os.getpid(), *sys.argv[1:], sep=",", file=file)
if sys.argv[2] == "broken":
    sys.exit("no such model: broken")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def server(machine):
    """Runs the script; what it started is ended with the test."""
    program = machine.folder / "serve"
    program.write_text(SERVER)
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def run(*words):
        return machine.run("vllm_restart.sh", port, *words, KTO_VLLM=str(program), KTO_VLLM_STATE=str(machine.folder))

    run.port, run.started = port, lambda: [line.split(",") for line in machine.lines("started")]
    yield run
    for pid, *_ in run.started():
        if alive(int(pid)):
            os.kill(int(pid), signal.SIGKILL)


def test_the_server_of_the_last_policy_takes_the_place_of_the_one_before(server):
    for folder in ("first", "second"):
        code, _, err = server("policy", folder)
        assert code == 0 and f"vLLM samples from {folder} on port {server.port}" in err
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as answer:
            assert answer.read().decode() == folder
    (first, *words), (second, *_) = server.started()
    assert words == ["serve", "first", "--served-model-name", "policy", "--host", "127.0.0.1", "--port", server.port]
    assert not alive(int(first)) and alive(int(second))


def test_a_server_that_does_not_start_is_an_error_with_the_end_of_its_log(server, machine):
    for _ in range(2):  # Nothing of the first attempt is in the way of the second.
        code, _, err = server("policy", "broken")
        assert code == 2 and "no such model: broken" in err
        assert "error: vllm serve ended before it answered" in err and "Allowed: a server that starts." in err
        assert not (machine.folder / f"vllm_{server.port}.pid").exists()


def test_a_server_of_somebody_else_is_left_alone(server, machine):
    assert server("policy", "theirs")[0] == 0
    (machine.folder / f"vllm_{server.port}.pid").unlink()
    code, _, err = server("policy", "ours")
    assert code == 2 and "a port that nothing uses" in err
    ((theirs, *_),) = server.started()
    assert alive(int(theirs))


def test_a_program_that_has_the_process_id_of_an_old_server_is_left_alone(server, machine):
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (machine.folder / f"vllm_{server.port}.pid").write_text(f"{stranger.pid} 1\n")
        assert server("policy", "ours")[0] == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_is_missing_is_said_and_a_dry_run_starts_nothing(server):
    code, _, err = server("policy")
    assert code == 2 and "2 arguments were given. Allowed: vllm_restart.sh PORT NAME FOLDER." in err
    code, out, _ = server("policy", "a folder", "--dry-run")
    assert code == 0 and "serve a\\ folder --served-model-name policy" in out and not server.started()
