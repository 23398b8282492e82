"""A set of TensorFlow Datasets, prepared as ArrayRecord and read by a process that has no TensorFlow."""

import json
import shutil
import subprocess
import sys

import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.files import expand
from kto_jax.data.rows.records import Feedback, Rejection, read_records
from kto_jax.data.rows.tfds import fetch_tfds

PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Thumbs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = sys.argv[1]

    def _info(self):
        turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
        features = {"prompt": turns, "completion": tfds.features.Text(), "label": tfds.features.Scalar(np.bool_)}
        features |= {"weight": np.float32, "ids": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
        features |= {"tags": tfds.features.Sequence(tfds.features.Text()), "nested": {"x": tfds.features.Text()}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{count} \u00e9?"}]
            completion = b"broken \\xff" if i == 3 else f"Hi {i}."
            row = {"prompt": prompt[i % 2:], "completion": completion, "label": i % 2 == 0, "weight": 0.5}
            yield i, row | {"ids": [1, 2], "tags": ["a"] * i, "nested": {"x": "y"}}

for form in sys.argv[2:]:
    Thumbs(data_dir=f"{sys.argv[1]}/{form}", file_format=form).download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of the dataset "thumbs" as ArrayRecord, version 1.0.0."""
    directory = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", PREPARE, directory, "array_record"], check=True, capture_output=True)
    return directory / "array_record"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tfds"


def test_a_prepared_directory_is_read_and_its_bytes_are_text(prepared, cache):
    source = f"tfds-dir:{prepared}/thumbs/1.0.0"
    records = sorted(read_records(source, DataConfig()), key=lambda r: getattr(r, "completion", "z"))
    user = {"role": "user", "content": "4 é?"}
    places = sorted(record.place for record in records)
    assert places == [f"{source}:{i}" for i in range(1, 5)]
    for i, record in enumerate(records[:3]):
        prompt = [user] if i % 2 else [{"role": "system", "content": "Be kind."}, user]
        assert record == Feedback(prompt, f"Hi {i}.", i % 2 == 0, 0.5, record.place)
    assert records[3] == Rejection("lone surrogate in completion", records[3].place)
    (path,) = cache.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["ids"] == [1, 2] and row["nested"] == {"x": "y"} for row in rows)
    assert sorted(row["tags"] for row in rows) == [["a"] * i for i in range(4)]
    assert not {"tensorflow", "tensorflow_datasets"} & set(sys.modules)


def test_a_directory_is_fetched_once_and_again_when_it_has_changed(prepared, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared / "thumbs" / "1.0.0", copy)
    (first,) = expand(f"tfds-dir:{copy}:test")
    written = first.path.stat().st_mtime_ns
    (again,) = expand(f"tfds-dir:{copy}:test")
    assert first.path == again.path and again.path.stat().st_mtime_ns == written
    assert len(first.path.read_text().splitlines()) == 1
    (copy / "note.txt").write_text("changed")
    (changed,) = expand(f"tfds-dir:{copy}:test")
    assert changed.path != first.path and changed.name == f"tfds-dir:{copy}:test"


READ = """
import sys
from pathlib import Path
from kto_jax.data.rows.tfds import fetch_tfds
fetch_tfds(sys.argv[1], Path(sys.argv[2]))
print("tensorflow" in sys.modules, "jax" in sys.modules)
"""


def test_a_set_is_found_by_name_and_tensorflow_is_not_imported(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    command = [sys.executable, "-c", READ, "tfds:thumbs:1.0.0/train[:3]", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("source", ["tfds:name", "tfds:/train", "tfds:name/", "tfds-dir:", "tfds-dir:path:"])
def test_a_source_without_name_or_split_is_refused(source, cache):
    with pytest.raises(ConfigError, match=r"tfds:name/split or tfds-dir:path:split\. Name the split"):
        expand(source)


def test_an_unreadable_dataset_is_refused_and_leaves_no_file(prepared, tmp_path, cache):
    for source in (f"tfds-dir:{tmp_path}/nothing", f"tfds-dir:{prepared}/thumbs/1.0.0:nosuch"):
        with pytest.raises(ConfigError, match=r"cannot be read: .*must be prepared as ArrayRecord"):
            expand(source)
    assert not list(cache.iterdir())


@pytest.fixture
def without_traces():
    """Other tests check that this process has not imported TensorFlow Datasets."""
    before = set(sys.modules)
    yield
    for name in [name for name in sys.modules if name not in before and name.split(".")[0] == "tensorflow_datasets"]:
        del sys.modules[name]


def test_rows_of_a_set_become_json_with_every_kind_of_feature(prepared, tmp_path, without_traces):
    path = tmp_path / "rows.jsonl"
    fetch_tfds(f"tfds-dir:{prepared}/thumbs/1.0.0:train", path)
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: len(row["tags"]))
    for i, row in enumerate(rows):
        assert [turn["role"] for turn in row["prompt"]] == ["system", "user"][i % 2 :]
        assert row["prompt"][-1]["content"] == "4 é?" and row["label"] is (i % 2 == 0) and row["weight"] == 0.5
        assert (row["ids"], row["tags"], row["nested"]) == ([1, 2], ["a"] * i, {"x": "y"})
    assert [row["completion"] for row in rows] == ["Hi 0.", "Hi 1.", "Hi 2.", "broken \udcff"]


@pytest.mark.parametrize("source", ["tfds:nosuchset_of_ours/train", "tfds-dir:{prepared}/thumbs/1.0.0:nosuch"])
def test_what_the_library_refuses_is_said_in_one_line_and_leaves_no_file(prepared, tmp_path, without_traces, source):
    source = source.format(prepared=prepared)
    with pytest.raises(ConfigError) as refused:
        fetch_tfds(source, tmp_path / "rows.jsonl")
    message = str(refused.value)
    assert message.startswith(f"data source {source!r} cannot be read: ") and "It is written tfds:name/split" in message
    assert message.endswith('Check the name, or prepare it with file_format="array_record".')
    assert not list(tmp_path.iterdir())
