"""Rotary scaling: the frequencies of each kind, and those of a sequence that depend on its length."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.models.attention.dense import rotary_frequencies, rotary_tables, sequence_lengths
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.models.model import Model
from kto_jax.models.rope import DynamicScaling, LongRopeScaling, YarnScaling
from tests.models.conftest import hidden_states
from tests.models.families.family_files import FILES, LLAMA, PHI

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def scaled(scaling, **changes):
    return read_config_json(LLAMA | {"rope_scaling": scaling} | changes)


def test_yarn_keeps_fast_turns_and_stretches_slow_ones():
    config = scaled({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, head_dim=64)
    plain = 1e4 ** (-np.arange(32) / 32)
    found = rotary_frequencies(config)
    turns = 4096 * plain / (2 * np.pi)
    close(found[turns > 40], plain[turns > 40])
    close(found[turns < 0.8], plain[turns < 0.8] / 4)
    between = (turns < 28) & (turns > 1.2)
    assert between.any() and (found[between] < plain[between]).all() and (found[between] > plain[between] / 4).all()
    assert config.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    cos, _ = rotary_tables(np.zeros((1, 3), np.int32), config, np.float32)
    close(cos, np.full((1, 3, 1, 32), 0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("extra", "attention"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
    ],
)
def test_the_growth_of_yarn_s_tables_may_be_given(extra, attention):
    config = scaled({"rope_type": "yarn", "factor": 4.0} | extra)
    assert config.rope_scaling == YarnScaling(4.0, 128, config.rope_scaling.attention_factor)
    assert config.rope_scaling.attention_factor == pytest.approx(attention)
    assert read_config_json(write_config_json(config)) == config


def test_longrope_takes_the_original_context_from_beside_the_scaling():
    factors = {"short_factor": [1.0, 2, 3, 4], "long_factor": [5.0, 6, 7, 8]}
    config = read_config_json(
        PHI | {"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "su", **factors}}
    )
    growth = config.rope_scaling.attention_factor
    assert config.rope_scaling == LongRopeScaling((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0), 32, growth)
    assert growth == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    assert write_config_json(config)["original_max_position_embeddings"] == 32
    close(rotary_frequencies(config), 1e4 ** (-np.arange(4) / 4) / [1, 2, 3, 4])


def test_each_sequence_of_a_row_has_the_frequencies_of_its_length():
    segments, positions = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0]]), np.array([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    lengths = sequence_lengths(positions, segments)
    np.testing.assert_array_equal(lengths, [[3, 3, 3, 5, 5, 5, 5, 5, 1]])
    plain = 1e4 ** (-np.arange(4) / 4)
    config = scaled({"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=4)
    assert config.rope_scaling == DynamicScaling(2.0, 4)
    cos, _ = rotary_tables(positions, config, np.float32, lengths_RL=lengths)
    base = 1e4 * (2 * 5 / 4 - 1) ** (8 / 6)
    close(cos[0, 2, 0], np.cos(2 * plain))
    close(cos[0, 5, 0], np.cos(2 * base ** (-np.arange(4) / 4)))
    scaling = LongRopeScaling((1, 2, 3, 4), (5, 6, 7, 8), 4, 1.5)
    cos, _ = rotary_tables(
        positions, dataclasses.replace(config, rope_scaling=scaling), np.float32, lengths_RL=lengths
    )  # fmt: skip
    close(cos[0, 2, 0], 1.5 * np.cos(2 * plain / [1, 2, 3, 4]))
    close(cos[0, 5, 0], 1.5 * np.cos(2 * plain / [5, 6, 7, 8]))


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_a_packed_sequence_is_rotated_as_in_a_row_by_itself(name):
    model = Model.create(read_config_json(FILES[name]), remat="none")
    params = model.init_params(jax.random.key(0), "float32")
    tokens = np.random.default_rng(0).integers(0, 64, (1, 30)).astype(np.int32)
    segments = np.array([[1] * 10 + [2] * 20])
    positions = np.array([[*range(10), *range(20)]])
    packed = hidden_states(model, params, tokens, segments, positions)
    short = hidden_states(model, params, tokens[:, :10], segments[:, :10], positions[:, :10])
    close(packed[:, :10], short, atol=1e-4)
    long = hidden_states(model, params, tokens[:, 10:], segments[:, 10:], positions[:, 10:])
    close(packed[:, 10:], long, atol=1e-4)
    plain = Model.create(dataclasses.replace(model.config, rope_scaling=None), remat="none")
    unscaled = hidden_states(plain, params, tokens, segments, positions)
    assert np.abs(unscaled[:, 10:] - long).max() > 0.01


def test_a_cache_longer_than_the_original_context_is_refused():
    model = Model.create(read_config_json(FILES["llama_dynamic"]))
    model.init_cache(1, 16)
    with pytest.raises(ConfigError, match=r"cache of 17 tokens.*exceeds 16 tokens.*Lower max_new_tokens"):
        model.init_cache(1, 17)
