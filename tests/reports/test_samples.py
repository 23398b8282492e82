import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.reports.samples import Samples, held_out_prompts, load_samples, perplexity, save_samples
from tests.synthetic import make_index

MODEL = Model.create(
    TransformerConfig(vocab_size=50, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32)
)


def test_perplexity_is_that_of_the_completion_tokens_alone():
    params = MODEL.init_params(jax.random.key(0), "float32")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, n).astype(np.int32) for n in (3, 5, 4, 6, 3, 5, 4, 6, 7, 2)]
    completions = [rng.integers(3, 50, n).astype(np.int32) for n in (4, 1, 6, 2, 3, 3, 5, 1, 2, 8)]

    @jax.jit
    def all_logps(ids):
        hidden = MODEL.hidden_states(params, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
        return jax.nn.log_softmax(MODEL.logits(params, hidden))[0]

    total = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        sequence = np.concatenate([prompt, completion])
        logps = all_logps(np.pad(sequence, (0, 10 - len(sequence)))[None])
        total += sum(float(logps[len(prompt) - 1 + k, token]) for k, token in enumerate(completion))
    expected = math.exp(-total / sum(map(len, completions)))
    assert perplexity(MODEL, params, prompts, completions) == pytest.approx(expected, rel=1e-5)


def test_held_out_prompts_are_distinct_and_from_the_evaluation_split():
    index = make_index(12, num_prompts=4)
    index.splits[4:] = 1
    prompts = held_out_prompts(index, 3)
    assert [prompt.tolist() for prompt in prompts] == [index.prompt(row).tolist() for row in (4, 5, 6)]
    assert len(held_out_prompts(index, 100)) == 4


def test_samples_survive_a_restart(tmp_path):
    samples = Samples(["a?"], ["b <c> \n"], 3.5)
    save_samples(tmp_path / "samples.json", samples)
    assert load_samples(tmp_path / "samples.json") == samples
