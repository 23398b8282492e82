import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest
from huggingface_hub import constants

from kto_jax.config import Config, DataConfig, ModelConfig, ReferenceConfig
from kto_jax.training.pinning import pin_sources
from tests import ROOT
from tests.storage.hub_server import serve_hub

HOST = """
import sys
from kto_jax.config import Config, ModelConfig, ProcessesConfig
from kto_jax.devices import processes
from kto_jax.training.pinning import pin_sources
processes.join(ProcessesConfig(count=2, timeout_seconds=60))
print(pin_sources(Config(model=ModelConfig(path="org/name"))).model.path)
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    with serve_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield served


def run_of(model="org/name", reference="", train="hub:org/name/train", held_out=""):
    return Config(
        model=ModelConfig(path=model),
        reference=ReferenceConfig(path=reference),
        data=DataConfig(train=train, eval=held_out),
    )


def record(config, workdir):
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))


def test_every_source_on_the_hub_is_pinned_and_no_other(hub, tmp_path):
    commit = hub.commit({"config.json": "{}"}, "main", "v1")
    train = ("rows/feedback.jsonl", {"source": "hub:org/name/train[:9]@v1", "weight": 0.5}, "tfds:name/train")
    pinned = pin_sources(run_of(str(tmp_path), "org/name@v1", train, "hub:org/name/test"))
    assert pinned.model.path == str(tmp_path) and pinned.reference.path == f"org/name@{commit}"
    mapping = {"source": f"hub:org/name/train[:9]@{commit}", "weight": 0.5}
    assert pinned.data.train == ("rows/feedback.jsonl", mapping, "tfds:name/train")
    assert pinned.data.eval == f"hub:org/name/test@{commit}"


def test_a_resumed_run_keeps_its_commits_and_does_not_ask_the_hub(hub, tmp_path):
    hub.commit({"config.json": "1"})
    first = pin_sources(run_of(), tmp_path / "run")
    record(first, tmp_path / "run")
    hub.commit({"config.json": "2"})
    hub.requests.clear()
    assert pin_sources(run_of(), tmp_path / "run") == first and not hub.requests
    assert pin_sources(run_of(), tmp_path / "other") != first


def test_a_branch_is_not_asked_again_when_a_run_is_resumed(hub, tmp_path, capsys):
    """One repository at two revisions: each keeps its own commit."""
    hub.commit({"config.json": "1"}, "v1")
    hub.commit({"config.json": "2"})
    config = run_of("org/name@v1", "org/name@main", ("hub:org/name:plain/train@v1", "hub:org/name/train"))
    first = pin_sources(config, tmp_path / "run")
    assert first.model.path != first.reference.path
    record(first, tmp_path / "run")
    hub.commit({"config.json": "3"}, "main", "v1")
    hub.requests.clear()
    assert pin_sources(config, tmp_path / "run") == first and not hub.requests
    assert f"org/name@v1: the run keeps the commit with which it began, {first.model.path}" in capsys.readouterr().err
    other = dataclasses.replace(config, model=ModelConfig(path=f"org/name@{'0' * 40}"))
    assert pin_sources(other, tmp_path / "run").model.path == other.model.path


def test_a_run_that_predates_recorded_commits_is_resumed_with_its_recorded_sources(hub, tmp_path):
    hub.commit({"config.json": "1"})
    record(run_of(), tmp_path)
    assert pin_sources(run_of(), tmp_path) == run_of()


def test_a_resumed_run_without_a_reference_path_or_held_out_files_gets_none(tmp_path):
    config = run_of(str(tmp_path), "", train="feedback.jsonl")
    record(config, tmp_path / "run")
    assert pin_sources(config, tmp_path / "run") == config


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_check_folder_reports_a_broken_config_json(hub, tmp_path, text):
    commit = hub.commit({"config.json": "1"})
    (tmp_path / "config.json").write_text(text)
    assert pin_sources(run_of(), tmp_path).model.path == f"org/name@{commit}"


def test_all_processes_use_the_commit_that_the_first_one_found(hub, tmp_path):
    """The branch of the second process's Hub is at another commit: it must not matter."""
    commit = hub.commit({"config.json": "1"})
    with serve_hub() as other, socket.create_server(("127.0.0.1", 0)) as server:
        other.commit({"config.json": "2"})
        urls, address = (hub.url, other.url), f"127.0.0.1:{server.getsockname()[1]}"
        server.close()
        running = []
        for number, url in enumerate(urls):
            names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
            own = {"HF_ENDPOINT": url, "KTO_JAX_CACHE": str(tmp_path / str(number)), "JAX_PLATFORMS": "cpu"}
            environment = os.environ | names | own
            command = [sys.executable, "-c", HOST]
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        try:
            found = [process.communicate(timeout=120)[0].split() for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    assert found == [[f"org/name@{commit}"]] * 2


def test_the_base_that_adapters_name_is_recorded_at_its_commit_and_kept(hub, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": "org/name", "revision": "v1"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    commit = hub.commit({"config.json": "{}"}, "v1")
    config = run_of(str(adapter), train="feedback.jsonl")
    first = pin_sources(config, tmp_path / "run")
    assert (first.model.base, first.reference.base) == (f"org/name@{commit}", "")
    record(first, tmp_path / "run")
    hub.commit({"config.json": "{}"}, "v1")
    hub.requests.clear()
    assert pin_sources(config, tmp_path / "run") == first and not hub.requests
