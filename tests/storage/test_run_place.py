"""Working copies of folders in buckets, against a server on this machine."""

import json
import shutil

import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage import run_place
from kto_jax.storage.bucket import Bucket
from kto_jax.storage.run_place import checkpoints_folder, fetch_folder, fetched, open_place
from tests.fake_buckets import make_bucket


@pytest.fixture(scope="module")
def gcs():
    return make_bucket("places")


@pytest.fixture
def bucket(gcs, request):
    return Bucket(f"{gcs}/{request.node.name}/run")


@pytest.fixture(scope="module")
def s3():
    return make_bucket("places", "s3")


@pytest.fixture
def in_s3(s3, request):
    return Bucket(f"{s3}/{request.node.name}/run")


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    for name in ("_CHECKPOINT_METADATA", "data"):
        (folder / name).write_text("1")


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".bucket.json"}


def visible(bucket):
    return {name for name in bucket.versions() if not name.startswith(".lease")}


def test_a_local_folder_is_itself(tmp_path):
    with open_place(str(tmp_path), writes=True) as place:
        place.pull()
        place.push()
        assert (place.path, place.name) == (tmp_path, str(tmp_path))
    assert str(checkpoints_folder(tmp_path)) == f"{tmp_path}/checkpoints"
    assert fetched(str(tmp_path)) == str(tmp_path)


def test_what_is_written_is_in_the_bucket_after_a_push_and_at_the_end(bucket):
    with open_place(bucket.url, writes=True) as place:
        (place.path / "a").write_text("1")
        place.push()
        assert visible(bucket) == {"a"}
        (place.path / "folder").mkdir()
        (place.path / "folder/b").write_text("2")
        (place.path / ".c.partial").write_text("half")
    assert visible(bucket) == {"a", "folder/b"}
    assert not place.path.exists()


def test_what_is_removed_is_removed_from_the_bucket(bucket):
    bucket.write("a", b"1")
    bucket.write("policy/b", b"1")
    with open_place(bucket.url, writes=True) as place:
        (place.path / "a").unlink()
    assert visible(bucket) == {"policy/b"}


def test_only_what_has_changed_is_pushed(bucket, monkeypatch):
    bucket.write("a", b"1")
    uploaded = []
    monkeypatch.setattr(Bucket, "upload", lambda self, path, name: uploaded.append(name))
    with open_place(bucket.url, writes=True) as place:
        (place.path / "b").write_text("1")
        place.push()
        (place.path / "b").write_text("22")
        place.push()
        place.push()
    assert uploaded == ["b", "b"]


def test_a_config_is_pushed_after_what_it_describes(bucket, monkeypatch):
    uploaded = []
    monkeypatch.setattr(Bucket, "upload", lambda self, path, name: uploaded.append(name))
    with open_place(bucket.url, writes=True) as place:
        (place.path / "policy").mkdir()
        for name in ("config.json", "policy/config.json", "policy/model.safetensors", "tokenizer.json"):
            (place.path / name).write_text("{}")
    assert uploaded == ["policy/model.safetensors", "tokenizer.json", "policy/config.json", "config.json"]


def test_results_and_checkpoints_are_not_copied_but_their_folders_are_there(bucket):
    for name in ("config.json", "tokenizer/a", "checkpoints/3/data", "policy/model.safetensors"):
        bucket.write(name, b"{}")
    with open_place(bucket.url, writes=True) as place:
        assert names(place.path) == {"config.json", "tokenizer/a"}
        assert {path.name for path in place.path.iterdir()} >= {"checkpoints", "policy"}
        assert str(checkpoints_folder(place.path)) == f"{bucket.url}/checkpoints"
    assert "policy/model.safetensors" in visible(bucket)


def test_a_process_that_only_reads_sees_what_the_first_one_has_pushed_and_writes_nothing(bucket):
    with open_place(bucket.url, writes=True) as first, open_place(bucket.url, writes=False) as other:
        (first.path / "a").write_text("1")
        first.push()
        other.pull()
        assert (other.path / "a").read_text() == "1"
        (other.path / "b").write_text("1")
    assert visible(bucket) == {"a"}


def test_errors_name_the_bucket_instead_of_the_copy(bucket):
    with (
        pytest.raises(ConfigError, match=f"^{bucket.url}/a cannot be read"),
        open_place(bucket.url, writes=True) as place,
    ):
        raise ConfigError(f"{place.path}/a cannot be read")


@pytest.mark.parametrize("error, kind", [
    (ValueError("UNAVAILABLE: the server"), TransientError), (ValueError("a number"), ValueError),
    (ConnectionResetError("reset"), TransientError), (OSError(28, "disk full"), OSError),
])  # fmt: skip
def test_a_failure_of_the_bucket_in_orbax_may_pass_and_others_stay_as_they_are(error, kind, gcs):
    with pytest.raises(kind), open_place(f"{gcs}/failing", writes=False):
        raise error


def test_the_lease_is_renewed_and_metrics_are_pushed_while_a_run_trains(bucket, monkeypatch):
    monkeypatch.setattr(run_place, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(run_place, "PUSH_SECONDS", 0)
    with open_place(bucket.url, writes=True) as place:
        (place.path / "metrics.jsonl").write_text("1")
        (lease,) = bucket.versions(".lease/")
        while "metrics.jsonl" not in visible(bucket) or not json.loads(bucket.read(lease))["renewals"]:
            pass


def test_a_run_whose_lease_was_taken_pushes_no_more(bucket):
    with pytest.raises(TransientError, match="was taken over"), open_place(bucket.url, writes=True) as place:
        bucket.write(".lease/000002.json", b"{}")
        (place.path / "a").write_text("1")
        place._lease.renew()
        place.push()
    assert visible(bucket) == set()


def test_a_copy_in_the_cache_is_read_once_and_follows_the_bucket(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    for name in ("config.json", "old", "checkpoints/3/data"):
        bucket.write(name, b"{}")
    folder = fetch_folder(bucket.url)
    assert names(folder) == {"config.json", "old"} and (folder / "checkpoints").is_dir()
    assert folder.name == "run" and str(checkpoints_folder(folder)) == f"{bucket.url}/checkpoints"
    assert f"copying {bucket.url} to {folder} (0.0 MB are new)" in capsys.readouterr().err
    read = []
    monkeypatch.setattr(Bucket, "download", lambda self, name, path: read.append(name) or path.write_bytes(b"{} "))
    assert fetched(bucket.url) == str(folder) and read == [] and capsys.readouterr().err == ""
    bucket.write("config.json", b"{} ")
    bucket.remove("old")
    fetch_folder(bucket.url)
    assert read == ["config.json"] and names(folder) == {"config.json"}


def test_the_policy_of_a_run_is_copied_with_the_run(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    for name in ("manifest.json", "policy/config.json"):
        bucket.write(name, b"{}")
    assert names(fetch_folder(f"{bucket.url}/policy").parent) == {"manifest.json", "policy/config.json"}


def test_a_folder_without_files_and_a_name_that_leaves_it_are_refused(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{bucket.url} holds no files"):
        fetch_folder(bucket.url)
    monkeypatch.setattr(Bucket, "versions", lambda self, below="": {"../evil": "1 x"})
    with pytest.raises(ConfigError, match=r"'../evil', which leaves the folder"):
        fetch_folder(bucket.url)


def test_checkpoints_in_s3_are_part_of_the_copy_and_pushed_after_all_else(in_s3, monkeypatch):
    uploaded, removed = [], []
    monkeypatch.setattr(Bucket, "upload", lambda self, path, name: uploaded.append(name))
    monkeypatch.setattr(Bucket, "remove", lambda self, name: removed.append(name))
    with open_place(in_s3.url, writes=True) as place:
        assert checkpoints_folder(place.path) == place.path / "checkpoints"
        write_checkpoint(place.path / "checkpoints/3")
        write_checkpoint(place.path / "checkpoints/6.orbax-checkpoint-tmp")
        (place.path / "metrics.jsonl").write_text("1")
        place.push()
        shutil.rmtree(place.path / "checkpoints/3")
    assert uploaded == ["metrics.jsonl", "checkpoints/3/data", "checkpoints/3/_CHECKPOINT_METADATA"]
    assert removed == ["checkpoints/3/_CHECKPOINT_METADATA", "checkpoints/3/data"]


def test_a_checkpoint_in_s3_that_a_killed_process_copied_in_part_is_removed(in_s3):
    for name in ("config.json", "checkpoints/3/data", "checkpoints/3/_CHECKPOINT_METADATA", "checkpoints/6/data"):
        in_s3.write(name, b"{}")
    whole = {"config.json", "checkpoints/3/data", "checkpoints/3/_CHECKPOINT_METADATA"}
    with open_place(in_s3.url, writes=True) as place:
        assert names(place.path) == whole
    assert visible(in_s3) == whole


def test_checkpoints_in_s3_are_copied_to_the_cache_when_they_are_read(in_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    checkpoint = {"checkpoints/3/data", "checkpoints/3/_CHECKPOINT_METADATA"}
    for name in ("config.json", *checkpoint):
        in_s3.write(name, b"{}")
    assert names(fetch_folder(in_s3.url)) == {"config.json", *checkpoint}  # There is no policy/ to read.
    in_s3.write("policy/config.json", b"{}")
    assert names(fetch_folder(in_s3.url)) == {"config.json", "policy/config.json"}
    assert names(fetch_folder(in_s3.url, checkpoints=True)) == {"config.json", "policy/config.json", *checkpoint}


def test_several_processes_cannot_train_in_s3(in_s3):
    with (
        pytest.raises(ConfigError, match="cannot hold the checkpoints of several processes"),
        open_place(in_s3.url, writes=True, shared=True),
    ):
        pass
