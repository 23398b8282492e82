import jax
import pytest

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.models.model import Model
from kto_jax.models.rope import Llama3Scaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "spelling",
    [{"rope_theta": 500000.0, "rope_scaling": SCALING}, {"rope_parameters": {"rope_theta": 500000.0, **SCALING}}],
    ids=["older", "newer"],
)
def test_both_spellings_of_the_rotary_settings_are_read(spelling):
    config = read_config_json(LLAMA | spelling)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_llama_8b_is_read_with_its_published_number_of_parameters():
    config = read_config_json(LLAMA)
    assert config.num_params() == 8_030_261_248
    assert (config.head_dim, config.bos_id, config.eos_id) == (128, 128000, 128001)
    assert config.eos_ids == (128001, 128008, 128009)


@pytest.mark.parametrize("values", [LLAMA, LLAMA | {"rope_theta": 5e5, "rope_scaling": SCALING, "eos_token_id": 2}])
def test_a_config_survives_being_written_and_read(values):
    config = read_config_json(values)
    assert read_config_json(write_config_json(config)) == config


def test_the_number_of_parameters_is_that_of_the_arrays(config):
    leaves = jax.tree.leaves(Model.create(config).abstract_params("float32"))
    assert config.num_params() == sum(leaf.size for leaf in leaves)


def test_flops_of_a_token_are_twice_its_matmul_weights_and_the_attention():
    config = TransformerConfig(10, 4, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=5)
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5  # q, k and v, output, feed-forward
    attention = 2 * 2 * 7 * 4  # scores and mixing over 7 tokens and 2 heads of 2
    assert config.flops_per_token(7, head=False) == 3 * (2 * weights + attention)
    assert config.flops_per_token(7) - config.flops_per_token(7, head=False) == 2 * 4 * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM.*LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config \(an unnamed method, 4 bits\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq, 4 bits\).*unquantised model.*nf4"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"\(awq, 4 bits\).*bitsandbytes in four bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\), whose weights are not read"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, r"\(bitsandbytes, 8 bits\)"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"num_key_value_heads": 5}, "num_kv_heads=5"),
        ({"num_hidden_layers": "32"}, "num_layers='32'"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn rotary scaling lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config_json(LLAMA | change)


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"remat": "half"}])
def test_unknown_options_of_the_model_are_refused(config, change):
    with pytest.raises(ConfigError, match="may be"):
        Model.create(config, **change)
