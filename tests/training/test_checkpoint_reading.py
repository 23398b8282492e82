"""What the errors of reading a checkpoint mean."""

import types

import pytest
from etils import epath

from kto_jax.config import ConfigError, TransientError
from kto_jax.training.checkpoint_reading import StoredTree
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
