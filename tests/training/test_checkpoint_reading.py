"""What the errors of reading a checkpoint mean, and which array they are of."""

import asyncio
import gc
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from kto_jax.config import ConfigError, TransientError
from kto_jax.training import checkpoint_reading
from kto_jax.training.checkpoint_reading import StoredTree, best_step, check_arrays, groups, quiet_libraries
from kto_jax.training.checkpoints import Checkpoints


@pytest.mark.parametrize("place, kind", [
    ("gs://bucket/run/checkpoints/3", TransientError), ("/run/checkpoints/3", ConfigError),
])  # fmt: skip
def test_a_bucket_that_does_not_answer_is_no_damage(place, kind):
    with pytest.raises(kind), StoredTree(epath.Path(place))._one_line():
        raise ValueError("no array") from ConnectionResetError("reset")


@pytest.mark.parametrize("place, code", [("gs://bucket/run/checkpoints", 75), ("/run/checkpoints", 1)])
def test_a_run_whose_last_save_failed_is_started_again_if_it_is_in_a_bucket(place, code):
    assert Checkpoints.exit_code.fget(types.SimpleNamespace(_directory=epath.Path(place))) == code


ZSTANDARD = b"\x28\xb5\x2f\xfd"
"""What a compressed array begins with."""


def arrays(**sizes):
    """Random arrays by name."""
    rng = np.random.default_rng(0)
    return {name: jax.numpy.asarray(rng.random(size, np.float32)) for name, size in sizes.items()}


def with_all_bits(leaf):
    """Random integers of as many bytes, which no compression makes smaller: their bytes are found in a file."""
    return jax.numpy.asarray(np.random.default_rng(leaf.size).integers(0, 2**32, leaf.size, np.uint32).view(np.int32))


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


# Orbax's reads of the other arrays, which pytest would hold against a later test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_array_that_cannot_be_read_is_named_and_the_others_can_be(tmp_path):
    tree = {name: with_all_bits(leaf) for name, leaf in arrays(first=20000, second=30000, third=5).items()}
    stored = StoredTree(epath.Path(tmp_path / "tree"), is_step=False)
    ocp.save(stored.place, tree)
    wanted = shapes_of(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, stored.load(wanted), tree))
    content = np.asarray(tree["second"]).tobytes()[4000:4032]
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file() and content in path.read_bytes()]
    data = bytearray(path.read_bytes())
    header = data.rindex(ZSTANDARD, 0, data.index(content))
    data[header : header + 4] = b"none"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"tree is damaged: second cannot be read \(\w+: ") as refused:
        stored.load(wanted)
    assert "\n" not in str(refused.value)
    others = stored.load({**wanted, "second": ocp.PLACEHOLDER})
    assert np.array_equal(others["first"], tree["first"]) and np.array_equal(others["third"], tree["third"])
    del refused
    gc.collect()


@pytest.mark.parametrize("record, is_step, finding", [
    ({"digests": "none"}, False, "its record holds no digests"),
    ({"digests": {}, "step": 7}, True, "it is the checkpoint of step 7, renamed or copied here"),
])  # fmt: skip
def test_a_record_that_is_not_of_its_folder_is_damage(tmp_path, record, is_step, finding):
    place = epath.Path(tmp_path / "8")
    if is_step:
        ocp.save_checkpointables(place, {"state": arrays(a=2)}, custom_metadata=record)
    else:
        ocp.save(place, arrays(a=2), custom_metadata=record)
    with pytest.raises(ConfigError, match=f"8 is damaged: {finding}"):
        StoredTree(place, is_step).record()


def test_all_arrays_that_differ_are_listed_up_to_six(tmp_path):
    found, wanted = arrays(**{f"a{i}": 2 for i in range(5)}, z=3), arrays(**{f"b{i}": 2 for i in range(3)}, z=4)
    with pytest.raises(ConfigError) as refused:
        check_arrays(found, wanted, epath.Path(tmp_path))
    message = str(refused.value)
    assert "b0: missing; b1: missing; b2: missing; a0: unexpected; a1: unexpected; a2: unexpected; and 3 mo" in message
    assert message.endswith("Restore the run's configuration, or choose another --workdir.")
    with pytest.raises(
        ConfigError, match=r"z: checkpoint has \(\(3,\), 'float32'\), model wants \(\(4,\), 'float32'\)"
    ):
        check_arrays({"z": found["z"]}, {"z": wanted["z"]}, epath.Path(tmp_path))


def test_arrays_are_grouped_by_size_and_a_large_one_is_alone(monkeypatch):
    monkeypatch.setattr(checkpoint_reading, "GROUP_BYTES", 40)
    leaves = list(arrays(a=4, b=6, c=1, d=30, e=1).values())
    assert list(groups(leaves)) == [[0, 1], [2], [3], [4]]
    assert list(groups(leaves[3:])) == [[0], [1]] and list(groups([])) == []


def test_the_best_step_has_the_lowest_loss_or_the_highest_of_another_figure_and_is_the_first():
    figures = {3: 0.5, 6: 0.25, 9: 0.25, 12: 0.75, 15: 0.75}
    assert (best_step(figures, "eval_loss"), best_step(figures, "eval_auc")) == (6, 12)


def test_late_answers_to_a_closed_loop_are_not_shown_and_other_errors_are(monkeypatch):
    class Raises:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))
    quiet_libraries()
    hook = sys.unraisablehook
    quiet_libraries()
    assert sys.unraisablehook is hook, "one for all checkpoints of a process"
    for message in ("Event loop is closed", "the disk is full"):
        raises = Raises(message)
        del raises

    async def read():
        try:
            await asyncio.sleep(0)
        except GeneratorExit:
            raise RuntimeError("freed") from None  # Orbax names the array

    reading = read()
    reading.send(None)
    del reading
    assert shown == ["the disk is full"]
