"""GGUF files of every family: written as llama.cpp's converter writes them, read back as the same model."""

import json
import shutil

import gguf
import numpy as np
import pytest
import tokenizers

from kto_jax.config import ConfigError
from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer
from kto_jax.exports.gguf_file import write_gguf
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.weights.gguf_layout import LAYOUTS
from kto_jax.models.weights.load import open_weights, read_config
from tests import TINY_MODEL
from tests.data.tokens.pieces import TEXTS, write_pieces
from tests.exports.gguf_models import GGUF_FILES
from tests.models.families.family_files import FILES
from tests.models.weights.directories import draw_weights, write_model

VOCAB = read_config(TINY_MODEL).vocab_size
OTHERWISE = "Export a Hugging Face directory, without --gguf"


def make_model(directory, file, vocab_size=VOCAB):
    """A model directory with random weights and a tokenizer, and these weights."""
    config = read_config_json(file | {"vocab_size": vocab_size})
    weights = draw_weights(config)
    write_model(directory, config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, directory)
    return config, weights


def write_file(tmp_path, name, kind="f32", **changes):
    config, weights = make_model(tmp_path / "model", GGUF_FILES[name] | changes)
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", kind, name=name)
    return config, weights, tmp_path / "model.gguf"


def stored(path):
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def metadata(path):
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.")}


def read_all(path):
    weights = open_weights(path)
    return {name: weights.read(name, (slice(None),) * len(shape)) for name, shape in weights.shapes.items()}


@pytest.mark.parametrize("name", GGUF_FILES)
def test_a_model_of_every_family_comes_back_from_its_file(tmp_path, name):
    config, weights, path = write_file(tmp_path, name)
    found = read_config(path)
    assert read_config_json(GGUF_FILES[name] | {"vocab_size": VOCAB}) == config
    for field in (
        "initializer_range",
        "balance_weight",
        "bos_id",
        "eos_ids",
        *(["family"] if name == "mistral" else []),
    ):
        object.__setattr__(found, field, getattr(config, field))  # These are not the architecture's.
    assert found == config
    back = read_all(path)
    assert back.keys() == weights.keys()
    for tensor, values in weights.items():
        np.testing.assert_allclose(back[tensor], values, rtol=0, atol=5e-7 if config.norm_offset else 0)
    part = next(tensor for tensor in weights if ".1." in tensor and weights[tensor].ndim == 2 and "norm" not in tensor)
    index = (slice(3, 17), slice(5, 20))
    np.testing.assert_array_equal(open_weights(path).read(part, index), weights[part][index])


def test_every_family_has_a_layout():
    assert LAYOUTS.keys() == FAMILIES.keys()


def test_all_keys_are_those_that_llama_cpp_names():
    def named(group):
        for name, value in vars(group).items():
            if isinstance(value, str):
                yield value.replace("{arch}.", "")
            elif isinstance(value, type) and not name.startswith("_"):
                yield from named(value)

    known = set(named(gguf.Keys))
    assert all(layout.keys.keys() <= known for layout in LAYOUTS.values())


@pytest.mark.parametrize("name", ["granite", "mixtral"])
def test_pairs_of_the_rotary_embedding_are_adjacent(tmp_path, name):
    _, weights, path = write_file(tmp_path, name)
    for short, full, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        values = weights[f"model.layers.1.self_attn.{full}.weight"]
        halves = values.reshape(heads, 2, 4, 32)  # first and second half of every head of 8
        np.testing.assert_array_equal(
            stored(path)[f"blk.1.{short}.weight"], halves.swapaxes(1, 2).reshape(values.shape)
        )


def test_gemma_norms_are_stored_as_they_are_used(tmp_path):
    _, weights, path = write_file(tmp_path, "gemma3")
    tensors = stored(path)
    for short, full in {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(tensors[f"blk.1.{short}.weight"], weights[f"model.layers.1.{full}.weight"] + 1)
    np.testing.assert_array_equal(tensors["output_norm.weight"], weights["model.norm.weight"] + 1)


def test_the_heads_of_gpt_neox_are_sorted_into_queries_keys_and_values(tmp_path):
    _, weights, path = write_file(tmp_path, "gpt_neox")
    for kind, rest in (("weight", (32,)), ("bias", ())):
        by_head = weights[f"gpt_neox.layers.1.attention.query_key_value.{kind}"].reshape(4, 3, 8, *rest)
        whole = np.concatenate([by_head[:, part].reshape(32, *rest) for part in range(3)])
        np.testing.assert_array_equal(stored(path)[f"blk.1.attn_qkv.{kind}"].reshape(whole.shape), whole)


@pytest.mark.parametrize(
    "name, gate", [("mixtral", "block_sparse_moe.experts.{}.w1"), ("olmoe", "mlp.experts.{}.gate_proj")]
)
def test_the_experts_of_a_layer_are_one_tensor(tmp_path, name, gate):
    config, weights, path = write_file(tmp_path, name, "f16")
    names = [f"model.layers.1.{gate.format(expert)}.weight" for expert in range(config.num_experts)]
    tensors = stored(path)
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_gate_exps.weight"], np.stack([weights[one] for one in names]).astype(np.float16)
    )
    assert tensors["blk.1.ffn_gate_inp.weight"].dtype == np.float32


def test_granite_states_its_factors(tmp_path):
    found = metadata(write_file(tmp_path, "granite")[-1])
    assert found["general.architecture"] == "granite"
    for key, value in {
        "embedding_scale": 3.0, "attention.scale": 0.2, "residual_scale": 0.5, "logit_scale": 0.5,
    }.items():  # fmt: skip
        assert found[f"granite.{key}"] == pytest.approx(value)


@pytest.mark.parametrize("name, stated", [
    ("gemma2", {"attention.sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma3", {"rope.freq_base_swa": 1000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    ("phi3", {"attention.sliding_window": 0, "rope.scaling.original_context_length": 128}),
    ("phi3_longrope", {"rope.dimension_count": 4, "rope.scaling.type": "longrope"}),
    ("gpt_neox", {"rope.dimension_count": 4, "use_parallel_residual": True, "rope.freq_base": 500.0}),
    ("mixtral", {"expert_count": 4, "expert_used_count": 2}),
    ("llama_yarn", {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16}),
])  # fmt: skip
def test_metadata_state_what_a_family_adds(tmp_path, name, stated):
    found = metadata(write_file(tmp_path, name)[-1])
    assert {key: found.get(f"{found['general.architecture']}.{key}") for key in stated} == stated


@pytest.mark.parametrize("kind", ["q8_0", "bf16", "f16"])
def test_matrices_are_kept_in_the_chosen_kind(tmp_path, kind):
    _, weights, path = write_file(tmp_path, "olmo2", kind, intermediate_size=64)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {tensors[f"blk.0.{name}.weight"].tensor_type.name for name in ("attn_q", "ffn_up")} == {kind.upper()}
    assert tensors["blk.0.attn_q_norm.weight"].tensor_type.name == "F32"
    for name, values in read_all(path).items():
        assert np.abs(values - weights[name]).max() < 0.05, name


def test_a_window_that_no_sequence_exceeds_is_none(tmp_path):
    *_, path = write_file(tmp_path, "mistral", sliding_window=128)
    assert read_config(path).window is None


@pytest.mark.parametrize("file, reason", [
    (FILES["mistral"], "'mistral' with window=5, where llama.cpp takes None"),
    (FILES["phi3"], "window=5, where llama.cpp takes None"),
    (FILES["gemma3"] | {"query_pre_attn_scalar": 16}, r"local_layers=\(True, False, True\), where"),
    (GGUF_FILES["gemma2"] | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=24, where llama.cpp takes 16"),
    (GGUF_FILES["gemma2"] | {"attn_logit_softcapping": None}, "attention_softcap=None, where llama.cpp takes 50.0"),
    (FILES["gpt_neox_serial"], "tied_head=True, where llama.cpp takes False; activation='gelu_tanh'"),
    (FILES["olmoe"] | {"norm_topk_prob": True}, "shares_sum_to_one=True, where llama.cpp takes False"),
    (FILES["qwen3_moe"] | {"norm_topk_prob": False}, "shares_sum_to_one=False, where llama.cpp takes True"),
    (FILES["llama_dynamic"], "rope_scaling={'rope_type': 'dynamic', 'factor': 4.0}, where llama.cpp takes None"),
])  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, file, reason):
    make_model(tmp_path / "model", file)
    with pytest.raises(ConfigError, match=f"(?s){reason}.*{OTHERWISE}"):
        write_gguf(tmp_path / "model.gguf", tmp_path / "model", "f16", name="x")
    assert not (tmp_path / "model.gguf").exists()


def test_a_reward_model_is_refused(tmp_path):
    make_model(tmp_path / "model", GGUF_FILES["gemma2"])
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["Gemma2ForSequenceClassification"]}))
    with pytest.raises(ConfigError, match="family 'gemma2' with a reward head, which is not written as GGUF"):
        write_gguf(tmp_path / "model.gguf", tmp_path / "model", "f16", name="x")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_of_pieces_is_written_and_read(tmp_path, prefix):
    make_model(tmp_path / "model", GGUF_FILES["gemma2"])
    write_pieces(tmp_path / "model", prefix=prefix)
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", "f16", name="x")
    found = read_gguf_tokenizer(tmp_path / "model.gguf")
    original = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in TEXTS:
        assert found.backend.encode(text).ids == original.encode(text).ids
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    stated = {"model": "llama", "pre": "default", "add_space_prefix": prefix, "add_bos_token": True}
    assert {name: fields[f"tokenizer.ggml.{name}"].contents() for name in stated} == stated


@pytest.mark.parametrize("definition, name", [
    ({"normalizer": {"type": "NFC"}}, "olmo"), ({"normalizer": None}, "gpt-2"),
])  # fmt: skip
def test_composed_characters_are_those_of_the_tokenizer(tmp_path, definition, name):
    make_model(tmp_path / "model", GGUF_FILES["olmo2"])
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | definition))
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", "f16", name="x")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name
    text = "nai\u0308ve"  # two code points for one letter
    found = read_gguf_tokenizer(tmp_path / "model.gguf").backend.encode(text).ids
    assert found == tokenizers.Tokenizer.from_file(str(file)).encode(text).ids
