"""What names in a LoRA configuration stand for, in models of several families."""

import pytest

from kto_jax.config import LORA_MATRICES, ConfigError, LoraConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.weights.adapter_names import resolve_lora
from tests.models.families.family_files import FILES


def resolved(name="mistral", **options):
    return resolve_lora(LoraConfig(rank=4, **options), read_config_json(FILES[name]))


@pytest.mark.parametrize(
    ("family", "targets", "matrices"),
    [
        ("mistral", ("query", "down"), ("query", "down")),
        ("mistral", ("q_proj", "value"), ("query", "value")),
        ("mistral", ("all-linear",), LORA_MATRICES),
        ("mistral", (r".*\.mlp\..*",), ("gate", "up", "down")),
        ("mistral", (r"model\.layers\.\d+\.self_attn\.[qk]_proj",), ("query", "key")),
        ("phi3", ("qkv_proj",), ("query", "key", "value")),
        ("gpt_neox", ("dense",), ("output",)),
        ("gpt_neox", LORA_MATRICES, ("query", "key", "value", "output", "up", "down")),
    ],
)
def test_matrices_are_named_as_here_as_in_transformers_or_by_an_expression(family, targets, matrices):
    assert resolved(family, targets=targets).targets == matrices


def test_patterns_name_matrices_likewise_and_the_first_counts():
    lora = resolved(rank_pattern=("q_proj=8", "self_attn\\..*=2"), alpha_pattern=("mlp\\..*=0.5",))
    assert lora.rank_pattern == ("query=8", "key=2", "value=2", "output=2")
    assert lora.alpha_pattern == ("gate=0.5", "up=0.5", "down=0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("qproj",)}, "names 'qproj', which is no matrix.*Did you mean 'q_proj'.*Allowed: query, .*q_proj"),
        ({"targets": ("lm_head",)}, "no matrix of the model.*Embedding and head: config.lora.modules_to_save"),
        ({"targets": ("q_proj(",)}, "no regular expression"),
        ({"targets": (r"model\.layers\.[01]\.self_attn\.q_proj",)}, "fits query in 2 of 3 layers"),
        ({"rank_pattern": ("query",)}, "has 'query'. Allowed: NAME=NUMBER"),
        ({"rank_pattern": ("query=2.5",)}, "has 'query=2.5'"),
        ({"targets": ("key",), "alpha_pattern": ("query=2",)}, "'query=2', and query has no adapter.*targets, key"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        resolved(**options)


def test_a_matrix_that_the_family_lacks_is_refused():
    with pytest.raises(ConfigError, match="names 'gate', which is no matrix"):
        resolved("gpt_neox", targets=("gate", "up"))


def test_the_head_of_a_tied_model_is_trained_with_its_embedding():
    with pytest.raises(ConfigError, match=r"the model's head is its embedding.*modules_to_save=embedding"):
        resolved("gemma2", modules_to_save=("head",))
