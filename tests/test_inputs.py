import numpy as np
import pytest

from kto_jax.config import Config, ConfigError, DataConfig, ModelConfig, ObjectiveConfig, SamplesConfig
from kto_jax.inputs import _check_judges, _check_model, make_plans
from kto_jax.models.config import TransformerConfig
from kto_jax.objectives import make_objective
from tests.synthetic import make_index

ARCHITECTURE = TransformerConfig(
    vocab_size=50, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, max_length=64
)

KTO = make_objective(ObjectiveConfig(), num_desirable=1, num_undesirable=1)


def config(**changes):
    data = DataConfig(train="x", max_length=38, max_prompt_length=19)
    return Config(**{"model": ModelConfig(path="x"), "data": data, "batch_size": 16, "microbatch_rows": 8} | changes)


def test_an_evaluation_is_a_fair_draw_even_where_the_file_is_sorted_by_prompt():
    index = make_index(400, num_prompts=40)
    index.prompt_hashes.sort()
    index.splits[:] = 1
    index.splits[:8] = 0
    _, held_out = make_plans(config(), index, KTO, None)
    batch = held_out.batch(0)
    assert np.sum(batch.unmatched.filled) == 16
    assert len({int(index.prompt_hashes[row]) for row in held_out.step(0).rows}) > 8
    assert held_out.step(0).rows.tolist() == make_plans(config(seed=5), index, KTO, None)[1].step(0).rows.tolist()


def test_without_held_out_rows_there_is_no_evaluation():
    assert make_plans(config(), make_index(40), KTO, None)[1] is None


def test_a_reference_may_differ_in_what_does_not_change_its_logits():
    import dataclasses

    other = dataclasses.replace(ARCHITECTURE, eos_ids=(1, 2), bos_id=7, initializer_range=0.1)
    _check_model(config(), ARCHITECTURE, other)
    with pytest.raises(ConfigError, match=r"another architecture than the policy: rope_theta 5.0 against 10000.0"):
        _check_model(config(), ARCHITECTURE, dataclasses.replace(other, rope_theta=5.0))
    with pytest.raises(ConfigError, match="beyond the model's context of 32"):
        _check_model(config(), ARCHITECTURE, dataclasses.replace(other, max_length=32))


def test_a_judge_without_feedback_of_its_own_is_refused_before_training():
    index = make_index(40)
    index.manifest["splits"] = {"judge": {"desirable": 3, "undesirable": 0}}
    _check_judges(config(), index)
    _check_judges(config(samples=SamplesConfig(num_prompts=4, judges=("vader",))), index)
    with pytest.raises(ConfigError, match=r"leaves 3 desirable and 0 undesirable.*Raise config.data.judge_holdout"):
        _check_judges(config(samples=SamplesConfig(num_prompts=4, judges=("feedback",))), index)
