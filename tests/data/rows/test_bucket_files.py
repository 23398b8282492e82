"""Feedback in a bucket, on servers of this machine: a file, a folder, a glob, and what is not there."""

import json

import pytest

from kto_jax import inspect
from kto_jax.config import ConfigError, TransientError
from kto_jax.data.rows.files import expand, read_rows
from kto_jax.storage.bucket import Bucket
from tests.fake_buckets import make_bucket

ROW = json.dumps({"prompt": "Hello?", "completion": "Hi.", "label": True}).encode() + b"\n"


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    url = make_bucket("feedback", request.param)
    folder = Bucket(f"{url}/team")
    folder.write("a.jsonl", ROW)
    folder.write("more/b.jsonl", ROW * 2)
    folder.write("more/c.csv", b"prompt,completion,label\nHello?,Hi.,true\n")
    folder.write("more/notes.txt", b"")
    folder.write("_hidden/d.jsonl", ROW)
    Bucket(f"{url}/teams").write("e.jsonl", ROW)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))


def places(source):
    return [place for file in expand(source) for place, _ in read_rows(file)]


def test_a_file_is_read_and_its_rows_are_named_by_its_url(bucket):
    assert places(f"{bucket.url}/a.jsonl") == [f"{bucket.url}/a.jsonl:1"]


def test_a_folder_is_read_at_any_depth_as_a_directory_is(bucket, capsys):
    expected = [f"{bucket.url}/{name}" for name in ("a.jsonl", "more/b.jsonl", "more/c.csv")]
    for source in (bucket.url, f"{bucket.url}/"):
        assert [file.name for file in expand(source)] == expected
        assert f"warning: {source}: 1 files of unknown ending are not read: 1 × .txt" in capsys.readouterr().err


def test_a_hidden_folder_is_read_if_it_is_named(bucket):
    assert places(f"{bucket.url}/_hidden") == [f"{bucket.url}/_hidden/d.jsonl:1"]


def test_a_whole_bucket_is_read(bucket):
    url = bucket.url.removesuffix("/team")
    assert [file.name for file in expand(url)][-1] == f"{url}/teams/e.jsonl" and len(expand(url)) == 4


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl", ["_hidden/d.jsonl", "a.jsonl", "more/b.jsonl"]),
        ("more/[bc].*", ["more/b.jsonl", "more/c.csv"]),
    ],
)
def test_a_glob_reads_what_it_matches(bucket, glob, names):
    assert [file.name for file in expand(f"{bucket.url}/{glob}")] == [f"{bucket.url}/{name}" for name in names]


def test_a_file_is_copied_once_and_again_if_it_has_changed(bucket, monkeypatch, capsys):
    bucket.write("grows.jsonl", ROW)
    source = f"{bucket.url}/grows.jsonl"
    (first,) = expand(source)
    assert f"copying {source} to " in capsys.readouterr().err
    read, download = [], Bucket.download

    def recorded(self, name, path):
        read.append(name)
        download(self, name, path)

    monkeypatch.setattr(Bucket, "download", recorded)
    assert expand(source) == [first] and read == [] and capsys.readouterr().err == ""
    digest = first.sha256()
    bucket.write("grows.jsonl", ROW * 2)
    assert len(places(source)) == 2 and read == ["team/grows.jsonl"] and first.sha256() != digest
    bucket.remove("grows.jsonl")
    with pytest.raises(ConfigError, match=f"data source '{source}' does not exist"):
        expand(source)


@pytest.mark.parametrize("name", ["none.jsonl", "none", "*.parquet"])
def test_what_is_not_there_is_refused(bucket, name):
    with pytest.raises(ConfigError, match=r"none|parquet.* does not exist\. It must name a file, a folder or a glob"):
        expand(f"{bucket.url}/{name}")


def test_a_file_of_unknown_ending_is_refused_before_it_is_copied(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "download", lambda self, name, path: pytest.fail(f"{name} was copied"))
    with pytest.raises(ConfigError, match=r"://feedback/team/more/notes.txt' has no known ending"):
        expand(f"{bucket.url}/more/notes.txt")


def test_a_bucket_that_is_not_there_is_refused():
    make_bucket("another")
    with pytest.raises(ConfigError, match="gs://nowhere"):
        expand("gs://nowhere/a.jsonl")


def test_a_bucket_that_does_not_answer_may_answer_later(bucket, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("reset")

    monkeypatch.setattr("kto_jax.storage.bucket.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(bucket._files, "glob", broken)
    with pytest.raises(TransientError, match="could not be listed"):
        expand(f"{bucket.url}/a.jsonl")


def test_inspect_reads_it(bucket, capsys):
    assert inspect.main(["--config=configs/tiny.py", f"--config.data.train={bucket.url}/more/b.jsonl"]) == 0
    said = capsys.readouterr()
    assert f"{bucket.url}/more/b.jsonl" in said.out + said.err
