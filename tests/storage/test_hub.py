import hashlib
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from kto_jax.config import ConfigError, TransientError
from kto_jax.data.rows.files import fetch_hub
from kto_jax.models.weights.model_files import find_model
from kto_jax.storage import hub as hub_module
from kto_jax.storage.fetch import local_path
from kto_jax.storage.hub import HubSource, parse, pinned
from kto_jax.storage.sums import check_export
from tests.storage.hub_server import serve_hub

SMALL = ["config.json", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
LEFT = ["README.md", "consolidated.safetensors", "modeling.py", "original/params.json", "pytorch_model.bin"]
SHARDS = '{"weight_map": {"a": "1-of-2.safetensors", "b": "2-of-2.safetensors"}}'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serve_hub() as served:
        ask(served.url, monkeypatch)
        yield served


def ask(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def files_in(folder):
    return sorted(file.name for file in Path(folder).iterdir())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", HubSource("model", "org/name", "", "")),
        ("org/name@v1.0", HubSource("model", "org/name", "", "v1.0")),
        ("org/name@refs/pr/1", HubSource("model", "org/name", "", "refs/pr/1")),
        ("hub:org/name/train", HubSource("dataset", "org/name", "train", "")),
        ("hub:org/name/train[:10%]@main", HubSource("dataset", "org/name", "train[:10%]", "main")),
        ("hub:name/train", HubSource("dataset", "name", "train", "")),
        ("hub:org/name:plain/train", HubSource("dataset", "org/name", "train", "", "plain")),
        ("hub:org/name:plain/train@v1", HubSource("dataset", "org/name", "train", "v1", "plain")),
        ("./org/name", None),
        ("name", None),
        ("wheel:some-data==1.0/rows.csv", None),
    ],
)
def test_sources_on_the_hub_are_recognised(source, expected):
    assert parse(source) == expected
    assert expected is None or not expected.revision or expected.at(expected.revision) == source


def test_local_folders_are_not_taken_for_sources_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert parse("org/name@v1") is None and parse("hub:org/name@v1/train") is None


@pytest.mark.parametrize("source", ["hub:name", "hub:", "hub:org/name/"])
def test_a_data_set_without_a_split_is_refused(source):
    with pytest.raises(ConfigError, match="hub:org/name/split"):
        parse(source)


def test_a_revision_is_pinned_to_the_commit_that_it_names_now(hub):
    first = hub.commit({"config.json": "1"}, "main", "v1")
    assert pinned("org/name") == pinned("org/name@v1") == f"org/name@{first}"
    assert pinned("hub:org/name/train") == f"hub:org/name/train@{first}"
    second = hub.commit({"config.json": "2"}, "main")
    assert pinned("org/name") == f"org/name@{second}" and pinned("org/name@v1") == f"org/name@{first}"


def test_a_commit_is_pinned_without_asking_the_hub(hub):
    source = "org/name@" + "0" * 40
    assert pinned(source) == source and not hub.requests


def test_a_model_at_a_commit_is_the_same_after_its_branch_has_moved(hub):
    hub.commit({"config.json": "1", "model.safetensors": "old"})
    source = pinned("org/name")
    hub.commit({"config.json": "2", "model.safetensors": "new"})
    assert (local_path(source) / "model.safetensors").read_text() == "old"
    assert (local_path("org/name") / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize(
    "weights",
    [
        {"model.safetensors": ""},
        {"model.safetensors.index.json": "{", "model.safetensors": ""},
        {"model.safetensors.index.json": SHARDS, "1-of-2.safetensors": "", "2-of-2.safetensors": ""},
    ],
    ids=["one file", "a broken index", "an index"],
)
def test_only_what_is_read_of_a_model_is_fetched(hub, weights):
    hub.commit(dict.fromkeys([*SMALL, *LEFT, "adapter_model.safetensors", "fp32/model.safetensors"], "") | weights)
    assert files_in(local_path("org/name")) == sorted([*SMALL, *weights])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_digests_are_fetched_and_compared_with_the_files_that_are_read(hub, name):
    files = {"config.json": "{}", "model.safetensors": "w"}
    lines = [f"{hashlib.sha256(text.encode()).hexdigest()}  {file}" for file, text in files.items()]
    sums = "\n".join([*lines, f"{'0' * 64}  not_read.bin", "# a line of another format"])
    hub.commit(files | {"SHA256SUMS": sums, "not_read.bin": "x"})
    folder = find_model("org/name").weights
    check_export(folder, weights=True)
    hub.commit(files | {"SHA256SUMS": sums, name: "changed"})
    with pytest.raises(ConfigError, match=rf"fetched from the Hub, is damaged: {name} differs .* Remove .*org--name"):
        check_export(find_model("org/name").weights, weights=True)


def test_the_requested_files_are_fetched_and_no_weights(hub):
    hub.commit(dict.fromkeys([*SMALL, "model.safetensors"], ""))
    assert files_in(local_path("org/name", hub_files=("config.json",))) == ["config.json"]


@pytest.mark.parametrize("source", ["org/name", "org/name@v1"])
def test_a_model_that_was_fetched_is_used_when_the_hub_is_away(hub, source):
    hub.commit({"config.json": "1", "model.safetensors": "w"}, "main", "v1")
    folder = local_path(source)
    hub.status = 503
    assert local_path(source) == local_path(pinned(source)) == folder


def test_a_model_in_the_hubs_own_cache_is_used_when_the_hub_is_away(hub, tmp_path):
    """Put there by another program, which noted the commit of the branch in the cache's own way."""
    commit = "c0ffee" + "0" * 34
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "snapshots" / commit / name).write_text("")
    hub.status = 503
    assert local_path("org/name") == folder / "snapshots" / commit


@pytest.mark.parametrize("source", ["org/name", "org/name@v1"])
def test_an_unreachable_hub_is_transient_and_the_error_says_what_to_do(hub, source):
    hub.status = 503
    with pytest.raises(TransientError, match=r"cannot be reached .*503.* Run the same command again"):
        local_path(source)
    with pytest.raises(TransientError, match="cannot be reached"):
        pinned(source)


def test_a_download_that_is_cut_short_is_transient(hub, monkeypatch):
    hub.commit({"config.json": "1", "model.safetensors": "w"})
    local_path("org/name", hub_files=("config.json",))
    hub.commits = {commit: {"config.json": "1"} for commit in hub.commits}
    download = hub_module._snapshot

    def cut(*args, **options):
        if not options.get("local_files_only"):
            raise ConnectionError("reset by peer")
        return download(*args, **options)

    monkeypatch.setattr(hub_module, "_snapshot", cut)
    with pytest.raises(TransientError, match="reset by peer"):
        local_path("org/name")


def test_a_hub_that_never_replies_is_given_up_within_seconds(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        start = time.monotonic()
        with pytest.raises(TransientError, match=r"It was asked for 0\.5 s"):
            local_path("org/name")
        assert time.monotonic() - start < 10


def test_a_hub_that_may_not_be_asked_is_no_reason_to_try_again(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="Check the network, or set a local path"):
        local_path("org/name")


def test_a_repository_or_revision_that_does_not_exist_is_refused(hub):
    hub.commit({"config.json": "1"})
    with pytest.raises(ConfigError, match="has no revision 'v9'"):
        pinned("org/name@v9")
    with pytest.raises(ConfigError, match="neither a local path nor a model"):
        pinned("org/other")
    with pytest.raises(ConfigError, match="neither a local path nor a dataset"):
        pinned("hub:org/other/train")


def test_a_cache_that_cannot_be_written_does_not_stop_a_fetch(hub, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "a file"))
    commit = hub.commit({"config.json": "1", "model.safetensors": "w"})
    assert local_path("org/name").name == commit


CARD = """---
configs:
- {config_name: plain, data_files: [{split: train, path: plain.jsonl}]}
- {config_name: rated, data_files: [{split: train, path: rated.jsonl}]}
---
"""


def test_one_configuration_of_a_data_set_is_fetched_at_its_commit(hub, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    hub.commit({"README.md": CARD, "plain.jsonl": '{"row": "plain"}\n', "rated.jsonl": '{"row": "first"}\n'}, "v1")
    source = pinned("hub:org/name:rated/train@v1")
    hub.commit({"README.md": CARD, "plain.jsonl": '{"row": "plain"}\n', "rated.jsonl": '{"row": "second"}\n'}, "v1")
    fetch_hub(source, tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == '{"row": "first"}\n'
    with pytest.raises(ConfigError, match=r"(?s)'plain', 'rated'.*hub:org/name:config/split"):
        fetch_hub(source.replace(":rated", ""), tmp_path / "none.jsonl")
