"""kto_jax.verify: what it prints of a whole, a damaged and an older run, and of models."""

import contextlib
import json
import shutil

import jax
import pytest

from kto_jax.config import CheckpointConfig
from kto_jax.devices.sharding import make_mesh
from kto_jax.storage.bucket import Bucket
from kto_jax.storage.sums import SUMS, write_sums
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.verify import main as verify
from tests import TINY_MODEL
from tests.base_model import write_base
from tests.fake_buckets import make_bucket
from tests.training.test_checkpoints import make_state
from tests.training.test_verified_checkpoints import MESH, flip, largest_file, save_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run as training leaves it, of two steps; the model of its policy/ is another one."""
    run = tmp_path_factory.mktemp("verify") / "run"
    run.mkdir()
    save_steps(run, count=2)
    for name in ("config.json", "manifest.json", "model.json"):
        (run / name).write_text(json.dumps({"name": name}))
    shutil.copytree(TINY_MODEL, run / "tokenizer")
    write_sums(run, ["config.json", "manifest.json", "model.json", "tokenizer/tokenizer.json"])
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    (run / "config_history.jsonl").write_text('{"first_step": 0, "config": {}}\n')
    write_base(run / "policy")
    write_base(run / "exports" / "2", "bfloat16")
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def lines_of(capsys):
    """The printed lines by part: state and detail; and the last line."""
    *lines, last = capsys.readouterr().out.splitlines()
    return {line[:28].rstrip(): (line[29:40].rstrip(), line[41:]) for line in lines}, last


def test_every_part_of_a_whole_run_is_listed(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert verify([f"--run={whole}"]) == 0
    parts, last = lines_of(capsys)
    assert list(parts) == [
        "config.json", "manifest.json", "model.json", "tokenizer/", "config_history.jsonl", "checkpoints/reference",
        "checkpoints/1", "checkpoints/2", "metrics.jsonl", "policy", "exports/2",
    ]  # fmt: skip
    logs = {"config_history.jsonl", "metrics.jsonl"}
    assert {name: state for name, (state, _) in parts.items() if state != "whole"} == dict.fromkeys(logs, "readable")
    assert parts["metrics.jsonl"][1] == "3 steps" and parts["checkpoints/2"][1].endswith(" MB")
    assert last == "0 of 11 parts are damaged; 2 can be read, and have no digests to compare"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def edit(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


DAMAGES = {
    "config.json": (lambda run: edit(run / "config.json", b"name", b"nama"), "config.json differs from SHA256SUMS"),
    "model.json": (lambda run: (run / "model.json").unlink(), "model.json is missing"),
    "tokenizer/": (lambda run: flip(run / "tokenizer" / "tokenizer.json", 999), "tokenizer/tokenizer.json differs"),
    "config_history.jsonl": (lambda run: (run / "config_history.jsonl").write_text("{}\n"), "is damaged: 'first_step'"),
    "metrics.jsonl": (lambda run: edit(run / "metrics.jsonl", b'{"step": 2}\n', b""), "from 1 to 3, in order; see"),
    "checkpoints/reference": (
        lambda run: flip(largest_file(run / "checkpoints" / "reference"), 8 * 700), "embed/table",
    ),
    "checkpoints/1": (lambda run: flip(largest_file(run / "checkpoints" / "1" / "state" / "d"), 8 * 700), ""),
    "checkpoints/2": (lambda run: shutil.rmtree(run / "checkpoints" / "2" / "state"), "2 is damaged: "),
    "policy": (lambda run: flip(run / "policy" / "model.safetensors", 80_000), "model.safetensors differs from SHA256"),
    "exports/2": (lambda run: (run / "exports" / "2" / "config.json").unlink(), "config.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("part", DAMAGES)
def test_a_damaged_part_is_named_and_the_exit_code_is_1(run, part, capsys):
    damage, found = DAMAGES[part]
    damage(run)
    assert verify([f"--run={run}"]) == 1
    parts, last = lines_of(capsys)
    assert {name for name, (state, _) in parts.items() if state == "DAMAGED"} == {part}
    assert found in parts[part][1] and last.startswith("1 of 11 parts are damaged")


def test_a_checkpoint_of_another_reference_and_one_that_was_set_aside_are_told_apart(run, tmp_path, capsys):
    other = tmp_path / "other"
    with contextlib.closing(Checkpoints(other, CheckpointConfig())) as checkpoints:
        state = make_state(make_mesh(MESH))
        checkpoints.save_reference(jax.tree.map(lambda leaf: leaf + 1, state.reference))
        checkpoints.save(3, state, None)
    (run / "checkpoints" / "1").rename(run / "checkpoints" / "1.damaged")
    shutil.copytree(other / "checkpoints" / "3", run / "checkpoints" / "3")
    assert verify([f"--run={run}"]) == 1
    parts, _ = lines_of(capsys)
    assert parts["checkpoints/1.damaged"][0] == "not checked"
    assert parts["checkpoints/3"][0] == "DAMAGED" and "it belongs to reference" in parts["checkpoints/3"][1]


def test_metrics_must_reach_the_newest_checkpoint(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert verify([f"--run={run}"]) == 1
    assert "from 1 to 2, in order; see step 2" in lines_of(capsys)[0]["metrics.jsonl"][1]


def test_parts_of_a_version_without_digests_are_read_and_counted(run, capsys):
    for folder in (run, run / "policy"):
        (folder / SUMS).unlink()
    assert verify([f"--run={run}"]) == 0
    parts, last = lines_of(capsys)
    assert parts["policy"][0] == parts["config.json"][0] == "readable" and "tensors" in parts["policy"][1]
    assert last.startswith("0 of 11 parts are damaged; 7 can be read")
    (run / "policy" / "model.safetensors").write_bytes(b"x")
    assert verify([f"--run={run}"]) == 1


def test_a_model_is_checked_alone(run, capsys):
    assert verify([f"--model={run / 'policy'}"]) == 0
    assert lines_of(capsys)[0]["policy"][0] == "whole"
    flip(run / "policy" / "tokenizer.json", 80)
    assert verify([f"--model={run / 'policy'}"]) == 1
    assert "tokenizer.json differs from SHA256SUMS" in lines_of(capsys)[0]["policy"][1]


@pytest.mark.parametrize("arguments, message", [
    ([], "--run='' and --model='' were given. Allowed: one of them"),
    (["--run=configs", "--model=configs"], "Allowed: one of them"),
    (["--run=configs"], "configs is not the folder of a run: it has no config.json"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused(arguments, message, capsys):
    assert verify(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_a_bucket_is_checked_where_it_is(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    bucket = Bucket(f"{make_bucket('verified')}/run")
    for path in sorted(whole.rglob("*")):
        if path.is_file():
            bucket.upload(path, path.relative_to(whole).as_posix())
    assert verify([f"--run={bucket.url}"]) == 0
    parts, last = lines_of(capsys)
    assert parts["checkpoints/2"][0] == parts["policy"][0] == "whole" and parts["exports/"][0] == "not checked"
    assert last.startswith("0 of 11 parts are damaged")
    damaged = tmp_path / "damaged"
    data = largest_file(whole / "checkpoints" / "2" / "state" / "d")
    shutil.copy(data, damaged)
    flip(damaged, 8 * 700)
    bucket.upload(damaged, data.relative_to(whole).as_posix())
    assert verify([f"--run={bucket.url}"]) == 1
    assert lines_of(capsys)[0]["checkpoints/2"][0] == "DAMAGED"
