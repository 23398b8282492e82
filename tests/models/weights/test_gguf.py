import dataclasses

import gguf
import numpy as np
import pytest
from gguf import quants

from kto_jax.config import ConfigError
from kto_jax.models.attention.dense import rotary_frequencies
from kto_jax.models.model import Model
from kto_jax.models.rope import LinearScaling, Llama3Scaling, recover_scaling
from kto_jax.models.weights.gguf import GgufWeights
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.tensors import expected_shapes

SCALING = Llama3Scaling(32.0, 1.0, 4.0, 8192)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permute(weights, heads):
    """Permutes query and key projections as llama.cpp's converter does."""
    out, width = weights.shape
    return weights.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def write_gguf(path, config, kind, *, architecture="llama", leave_out=(), extra=(), vocabulary=(), stated=()):
    """Writes a random model as llama.cpp's converter would, and returns its weights under Hugging Face's names."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for key, value in dict(stated).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary)
        writer.add_token_types([1] * len(vocabulary))
        writer.add_token_merges([])
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = random.standard_normal(shape, np.float32)
        tensor_kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        own = name
        for theirs, short in GGUF_NAMES.items():
            own = own.replace(theirs, short)
        if own in leave_out:
            continue
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        stored = quants.quantize(permute(values, heads) if heads else values, tensor_kind)
        writer.add_tensor(own, stored, raw_dtype=tensor_kind)
        weights[name] = quants.dequantize(quants.quantize(values, tensor_kind), tensor_kind)
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def config(config):
    """Rows of a multiple of 32 values, which the quantisations require."""
    return dataclasses.replace(config, mlp_dim=64, norm_eps=1e-5)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_quantisation_is_read_and_the_permutation_undone(config, tmp_path, kind, tied):
    config = dataclasses.replace(config, tied_head=tied, initializer_range=0.02)
    weights = write_gguf(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType[kind])
    assert read_config(tmp_path / "m.gguf") == config
    read = GgufWeights(tmp_path / "m.gguf")
    assert read.shapes == expected_shapes(config)
    for name, values in weights.items():
        whole = (slice(None),) * values.ndim
        np.testing.assert_array_equal(read.read(name, whole), values)
        part = (slice(3, 17), slice(5, 30))[: values.ndim]
        np.testing.assert_array_equal(read.read(name, part), values[part])


def test_parameters_are_loaded_from_a_gguf_file(config, tmp_path):
    weights = write_gguf(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType.Q8_0)
    params = load_params(Model.create(config), tmp_path / "m.gguf", param_dtype="float32")
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["attention"]["query"]["weight"][1], query.T)
    np.testing.assert_array_equal(params["head"]["weight"], weights["lm_head.weight"].T)


@pytest.mark.parametrize("head_dim", [8, 16, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "scaling",
    [
        *(Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192), Llama3Scaling(8.0, 1.0, 4.0, 128)),
        *(Llama3Scaling(4.5, 2.0, 16.0, 300), Llama3Scaling(8.0, 1.0, 3.0, 128), Llama3Scaling(8.0, 1.0, 16.0, 32768)),
        LinearScaling(4.0),
    ],
    ids=str,
)
def test_a_scaling_is_recovered_from_its_factors(head_dim, theta, scaling):
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scaled = scaling.scale_frequencies(frequencies)
    found = recover_scaling(frequencies, (frequencies / scaled).astype(np.float32).astype(float))
    np.testing.assert_allclose(found.scale_frequencies(frequencies), scaled, rtol=3e-6)
    if head_dim == 128 and scaling in (Llama3Scaling(8.0, 1.0, 4.0, 8192), LinearScaling(4.0)):
        assert found == scaling


def test_factors_of_no_scaling_are_refused(config, tmp_path):
    factors = rotary_frequencies(config) / SCALING.scale_frequencies(rotary_frequencies(config))
    write = lambda values: write_gguf(  # noqa: E731
        tmp_path / "m.gguf", config, gguf.GGMLQuantizationType.F32, extra=[("rope_freqs.weight", values)]
    )
    write(np.ones_like(factors, np.float32))
    assert GgufWeights(tmp_path / "m.gguf").config.rope_scaling is None
    for values in (factors * 2, factors[::-1], factors[1:], factors / 2):
        write(values.astype(np.float32))
        with pytest.raises(ConfigError, match="are those of no llama3 or linear scaling"):
            GgufWeights(tmp_path / "m.gguf")


@pytest.mark.parametrize("stated, reason", [
    ({"attention.clamp_kqv": 8.0}, "has the metadata attention.clamp_kqv=8.0, which is not known of the architecture"),
    ({"rope.scaling.type": "su"}, "rotary embedding is scaled by 'su'; none, linear, yarn, llama3 and"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"lacks the metadata llama\.rope\.scaling\.original"),
    ({"attention.value_length": 4.0}, "heads of 8 have 8 rotated dimensions and values of 4.0; all must be equal"),
])  # fmt: skip
def test_metadata_that_would_change_what_is_computed_are_refused(config, tmp_path, stated, reason):
    write_gguf(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType.F32, stated=stated)
    with pytest.raises(ConfigError, match=reason):
        read_config(tmp_path / "m.gguf")


def test_metadata_that_change_nothing_are_passed_over(config, tmp_path):
    stated = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "tensor_data_layout": "Meta AI original pth"}
    write_gguf(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType.F32, stated=stated)
    assert read_config(tmp_path / "m.gguf").rope_scaling is None


def test_a_factor_without_a_kind_is_linear_scaling(config, tmp_path):
    write_gguf(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType.F32, stated={"rope.scaling.factor": 4.0})
    assert read_config(tmp_path / "m.gguf").rope_scaling == LinearScaling(4.0)


def test_files_of_other_models_and_broken_files_are_refused(config, tmp_path):
    path = tmp_path / "m.gguf"
    kind = gguf.GGMLQuantizationType.F32
    write_gguf(path, config, kind, architecture="mamba")
    with pytest.raises(ConfigError, match=r"architecture 'mamba'; llama, qwen2, .*, granite are supported"):
        read_config(path)
    write_gguf(path, config, kind, leave_out=["blk.1.attn_q.weight"])
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_params(Model.create(config), path, param_dtype="float32")
    write_gguf(path, config, kind, extra=[("blk.0.attn_q.bias", np.zeros(32, np.float32))])
    with pytest.raises(ConfigError, match=r"unexpected: blk\.0\.attn_q\.bias"):
        load_params(Model.create(config), path, param_dtype="float32")
    whole = path.read_bytes()
    for broken in (b"", b"GGUF", whole[:300], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match="cannot be read as GGUF"):
            GgufWeights(path)
