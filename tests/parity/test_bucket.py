"""Hosts that share only a bucket train, lose one and resume; transformers on torch opens the policy from the bucket."""

import contextlib
import signal

import numpy as np
import pytest

from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.storage.bucket import Bucket
from tests.commands.test_train_in_bucket import finish, start_processes, wait_for_checkpoint
from tests.fake_buckets import make_bucket
from tests.parity.test_transformers import our_logits, their_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(0).integers(1, 500, (2, 40))


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_policy_that_hosts_with_only_a_bucket_have_trained_opens_in_transformers(count, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run = Bucket(f"{make_bucket(f'parity{count}')}/resumed_by_{count}")
    with contextlib.ExitStack() as stack:
        processes = start_processes(run, tmp_path / "first", 2, "--config.checkpoint.every=1")
        for process in processes:
            stack.callback(process.kill)
        wait_for_checkpoint(run, processes[0])
        processes[1].kill()
        codes, messages = finish(processes)
    assert codes[0] in (75, -signal.SIGABRT) and codes[1] == -signal.SIGKILL, messages[0]
    codes, messages = finish(start_processes(run, tmp_path / "second", count))
    assert codes == [0] * count and "continuing after step" in messages[0], "\n".join(messages)

    folder = tmp_path / "downloaded"
    for name in run.versions("policy/"):
        run.download(name, folder / name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    assert transformers.AutoTokenizer.from_pretrained(folder / "policy").encode("Hello")
    files = find_model(str(folder / "policy"))
    model = Model.create(read_config(files.weights))
    params = load_params(model, files, param_dtype="float32")
    np.testing.assert_allclose(our_logits(model, params, TOKENS), their_logits(torch, theirs, TOKENS), atol=1e-4)
