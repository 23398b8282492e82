import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.sharding import PARAMETER_RULES, make_mesh, shardings
from kto_jax.models.attention.dense import dense_attention, rotary_frequencies
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model
from kto_jax.models.rope import LinearScaling
from kto_jax.models.transformer import Linear, RMSNorm
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.tensors import expected_shapes
from tests import ROOT
from tests.models.conftest import draw_tokens, hidden_states, whole_rows
from tests.models.families.family_files import FILES, MULTIMODAL_FILES, WINDOW

ARCHITECTURES = ROOT / "configs" / "architectures"
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
read = read_config_json


@pytest.fixture(scope="module")
def drawn():
    """A model of a family, and random parameters, including norms and biases."""
    made = {}

    def make(name):
        if name not in made:
            model = Model.create(read(FILES[name]), remat="none")
            random = np.random.default_rng(0)
            draw = lambda leaf: random.normal(0, 0.3, leaf.shape).astype("f")  # noqa: E731
            made[name] = model, jax.tree.map(draw, model.abstract_params("float32"))
        return made[name]

    return make


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_family_survives_being_read_and_written(name):
    config = read(FILES[name])
    written = write_config_json(config)
    assert read(written) == config
    assert (written["architectures"], written["model_type"]) == (
        FILES[name]["architectures"],
        FILES[name]["model_type"],
    )
    # By its model_type alone, as in files of base models.
    assert read(written | {"architectures": None}) == config


@pytest.mark.parametrize(
    ("name", "total", "active"),
    # Published: the model cards of Qwen3 and Mixtral, and OLMoE's report (arXiv 2409.02060), table 10.
    [("qwen3_30b_a3b", 30.5e9, 3.3e9), ("mixtral_8x7b", 46.7e9, 12.9e9), ("olmoe_1b_7b", 6.9e9, 1.3e9)],
)
def test_mixtures_of_experts_have_the_published_number_of_parameters(name, total, active):
    config = read_config(ARCHITECTURES / name)
    assert config.num_params() == pytest.approx(total, rel=0.005)
    assert config.num_active_params() == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("name", "family", "total", "without_tables"),
    # Published: Qwen by model cards, Gemma 2 and 3 by their reports, tables 2 and 1 (the latter in millions).
    [
        ("qwen2_5_7b", "qwen2", 7.61e9, 6.53e9),
        ("qwen3_8b", "qwen3", 8.19e9, 6.95e9),
        ("gemma_2_9b", "gemma2", 9.24e9, 8_324_201_984),
        ("gemma_3_4b", "gemma3_text", 3.88e9, 3.209e9),
    ],
)
def test_the_architectures_have_the_published_number_of_parameters(name, family, total, without_tables):
    config = read_config(ARCHITECTURES / name)
    tables = config.vocab_size * config.embed_dim * (1 if config.tied_head else 2)
    assert config.family == family
    assert config.num_params() == pytest.approx(total, rel=1e-3)
    assert config.num_params() - tables == pytest.approx(without_tables, rel=1e-3 if without_tables < 8e9 else 0)


def test_every_family_has_a_file_here():
    assert {values["model_type"] for values in FILES.values()} | {"llama"} == set(FAMILIES)


@pytest.mark.parametrize("name", FILES)
def test_the_number_of_parameters_is_that_of_the_arrays_and_of_the_file(name):
    config = read(FILES[name])
    leaves = jax.tree.leaves(Model.create(config).abstract_params("float32"))
    sizes = sum(int(np.prod(shape)) for shape in expected_shapes(config).values())
    assert config.num_params() == sum(leaf.size for leaf in leaves) == sizes


@pytest.mark.parametrize(
    ("name", "change", "local"),
    [
        ("mistral", {}, (True, True, True)),
        ("mistral", {"sliding_window": None}, (False, False, False)),
        ("qwen2", {}, (False, False, False)),
        ("qwen2_window", {}, (False, True, True)),
        ("qwen2_window", {"max_window_layers": 3}, (False, False, False)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (True, True, True)),
        ("gemma2", {}, (True, False, True)),
        ("gemma3", {}, (True, False, True)),
        ("gemma3", {"sliding_window_pattern": 6}, (True, True, True)),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, (False, True, True)),
    ],
)
def test_which_layers_are_local(name, change, local):
    config = read(FILES[name] | change)
    assert config.layers_are_local == local
    assert (config.window is not None) is any(local)
    assert read(write_config_json(config)) == config


def test_missing_entries_get_the_defaults_of_transformers():
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    bare = {name: FILES["gemma3"][name] for name in sizes} | {"hidden_size": 64, "num_attention_heads": 16}
    gemma3 = read(bare | {"model_type": "gemma3_text", "num_hidden_layers": 12})
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.head_dim) == (1e6, 1e4, 256)
    assert (gemma3.tied_head, gemma3.window, gemma3.layers_are_local) == (True, 4096, ((True,) * 5 + (False,)) * 2)
    gemma2 = read(bare | {"model_type": "gemma2"})
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.query_pre_attn_scalar) == (50.0, 30.0, 256)
    mistral, llama = read(bare | {"model_type": "mistral"}), read(bare | {"model_type": "llama"})
    assert (mistral.window, mistral.max_length, mistral.num_kv_heads) == (4096, 131072, 8)
    assert read(bare | {"model_type": "mistral", "num_key_value_heads": None}).num_kv_heads == 16
    assert (llama.max_length, llama.num_kv_heads) == (2048, 16)
    assert (llama.bos_id, llama.eos_ids) == (mistral.bos_id, mistral.eos_ids) == (1, (2,))
    assert read(bare | {"model_type": "llama", "bos_token_id": None, "eos_token_id": None}).eos_ids == ()
    qwen3 = read(bare | {"model_type": "qwen3", "num_attention_heads": 64})
    assert (qwen3.head_dim, qwen3.num_kv_heads, qwen3.bos_id, qwen3.eos_ids) == (128, 32, None, ())


def test_rotary_settings_by_kind_of_layer_are_read_from_either_spelling():
    older = read(FILES["gemma3"])
    newer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    dropped = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    file = {name: value for name, value in FILES["gemma3"].items() if name not in dropped}
    assert read(file | {"rope_parameters": newer}) == older
    assert (older.rope_theta, older.local_rope_theta, older.rope_scaling) == (1e6, 1e3, LinearScaling(8.0))
    close(rotary_frequencies(older), 1e6 ** (-np.arange(8) / 8) / 8)
    close(rotary_frequencies(older, local=True), 1e3 ** (-np.arange(8) / 8))
    # If both kinds share one set, local layers are scaled too.
    shared = dataclasses.replace(older, local_rope_theta=None)
    close(rotary_frequencies(shared, local=True), rotary_frequencies(older))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gemma3",
            {"architectures": ["Gemma3nForCausalLM"]},
            "Gemma3nForCausalLM'.*Gemma3ForCausalLM.* are supported. The nearest by name is Gemma3ForCausalLM",
        ),
        ("qwen2", {"architectures": None, "model_type": "qwen2_5_omni"}, "nearest by name is qwen2"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "name no kind of layer"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "embedding of local layers by.*2.0",
        ),
        ("gemma3", {"sliding_window": None}, "no sliding_window"),
        ("gemma2", {"layer_types": ["full_attention"]}, "name 1 layers as full_attention; each of 3"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("gemma2", {"sliding_window": 0}, "window=0"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_softcap=-1.0"),
        ("gemma", {"num_hidden_layers": "3"}, "num_layers='3'"),
        ("gemma2", {"num_hidden_layers": "3"}, "num_layers='3'"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "'mrope'.*'default', 'linear'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "gamma": 2}}, "yarn rotary scaling has gamma=2"),
        (
            "phi3_longrope",
            {"partial_rotary_factor": 1.0},
            "longrope scaling has 2 factors.* each of the 4 rotated",
        ),
        ("gpt_neox", {"rotary_pct": 0.4}, "head_dim=8 and rotary_dim=3"),
        ("gpt_neox", {"rope_theta": 5.0}, "has rope_theta=5.0, which the family 'gpt_neox' does not know"),
        ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("granite", {"logits_scaling": 0.0}, "logits_divisor=0.0"),
        ("mistral", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("qwen3", {"mamba_layers": 3}, "has mamba_layers=3, which the family 'qwen3' does not know.*remove the entry"),
        ("qwen2", {"rope_scaling": {"type": "linear"}}, "linear rotary scaling lacks factor"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by kind of layer"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            "qwen2",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "llama3"}},
            "rope_scaling of 'linear' and rope_parameters of 'llama3'. They must agree. Remove",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types="),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token=5 of num_experts=4"),
        ("mixtral", {"num_local_experts": "4"}, "num_experts='4'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]; only \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ],
)
def test_unsupported_options_of_a_family_are_refused_by_name(name, change, message):
    with pytest.raises(ConfigError, match=message):
        read(FILES[name] | change)


def test_entries_that_change_nothing_are_read_over():
    others = {"torch_dtype": "bfloat16", "transformers_version": "4.40", "auto_map": {"AutoConfig": "x.Y"}}
    asks_for_nothing = {"mamba_layers": None, "use_mamba": False, "experts": []}
    assert read(FILES["phi3"] | others | asks_for_nothing) == read(FILES["phi3"])


@pytest.mark.parametrize("name", MULTIMODAL_FILES)
def test_the_language_model_of_a_model_that_reads_images_is_read(name):
    file = MULTIMODAL_FILES[name]
    alone = file["text_config"] | {"tie_word_embeddings": file["tie_word_embeddings"]}
    assert read(file) == read(alone) == read(file | {"architectures": None})
    assert read(file | {"eos_token_id": [1, 106]}).eos_ids == (1, 106)


def test_published_files_leave_out_what_transformers_knows_of_gemma_3():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    found = read({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text})
    assert found == dataclasses.replace(read_config(ARCHITECTURES / "gemma_3_4b"), eos_ids=(1,))


def test_a_config_that_its_family_cannot_express_is_not_written():
    config = dataclasses.replace(read(FILES["qwen3"]), final_softcap=30.0)
    with pytest.raises(AssertionError, match=r"no config.json of a qwen3 describes"):
        write_config_json(config)


def test_flops_count_of_local_layers_only_what_they_see():
    config = read(FILES["gemma2"])
    body = config.flops_per_token(0, head=False)
    one = 4 * config.num_heads * config.head_dim
    assert config.flops_per_token(3, head=False) - body == 3 * 3 * one
    assert config.flops_per_token(20, head=False) - body == (20 + 2 * WINDOW) * one
    assert config.flops_per_token(20, attended_locally=4.5, head=False) - body == (20 + 2 * 4.5) * one


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        *((name, False) for name in ("qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox", "granite")),
        *((name, True) for name in ("qwen2", "gemma3", "phi3", "gpt_neox")),
        *((name, reward) for name in ("mixtral", "qwen3_moe") for reward in (False, True)),
    ],
)
def test_a_model_of_each_family_survives_export_and_import_bitwise(drawn, tmp_path, name, reward):
    model, params = drawn(name)
    if reward:
        model = Model.create(model.config, scalar_head="reward")
        params = {part: leaf for part, leaf in params.items() if part != "head"}
        params |= {"scorer": {"weight": np.ones(model.config.embed_dim, "f")}}
    params = jax.tree.map(jnp.asarray, params)
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=None, model_card="")
    assert read_config(tmp_path / "out") == model.config
    jax.tree.map(np.testing.assert_array_equal, load_params(model, tmp_path / "out", param_dtype="float32"), params)


def test_there_is_no_reward_model_of_a_family_without_a_classifier():
    with pytest.raises(ConfigError, match=r"family 'granite'.*no sequence classifier.*llama, mistral"):
        Model.create(read(FILES["granite"]), scalar_head="reward")


def test_fused_tensors_hold_their_parameters_in_the_order_of_the_file(drawn, tmp_path):
    model, params = drawn("gpt_neox")
    save_hugging_face(tmp_path / "out", model, jax.tree.map(jnp.asarray, params), tokenizer_dir=None, model_card="")
    fused = load_file(tmp_path / "out" / "model.safetensors")["gpt_neox.layers.1.attention.query_key_value.bias"]
    wanted = [params["layers"]["attention"][name]["bias"][1].reshape(4, 8) for name in ("query", "key", "value")]
    np.testing.assert_array_equal(fused, np.stack(wanted, axis=1).reshape(-1))
    model, params = drawn("phi3")
    save_hugging_face(tmp_path / "phi", model, jax.tree.map(jnp.asarray, params), tokenizer_dir=None, model_card="")
    fused = load_file(tmp_path / "phi" / "model.safetensors")["model.layers.2.self_attn.qkv_proj.weight"]
    wanted = [params["layers"]["attention"][name]["weight"][2].T for name in ("query", "key", "value")]
    np.testing.assert_array_equal(fused, np.concatenate(wanted))


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_each_device_reads_its_own_part_of_a_fused_tensor(drawn, tmp_path, name):
    model, params = drawn(name)
    params = jax.tree.map(jnp.asarray, params)
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=None, model_card="")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    spread = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(model, tmp_path / "out", param_dtype="float32", shardings=spread), params,
    )  # fmt: skip


def rewritten(folder, model, params, change, config=None):
    """A directory with the tensors that `change` makes of the model's, as another program would have written it."""
    save_hugging_face(folder / "ours", model, params, tokenizer_dir=None, model_card="")
    (folder / "other").mkdir()
    save_file(change(load_file(folder / "ours" / "model.safetensors")), folder / "other" / "model.safetensors")
    values = json.loads((folder / "ours" / "config.json").read_text()) if config is None else config
    (folder / "other" / "config.json").write_text(json.dumps(values))
    return folder / "other"


def test_tensors_by_the_names_of_other_versions_and_buffers_are_read(drawn, tmp_path):
    def change(held):
        held["lm_head.weight"] = held.pop("embed_out.weight")
        return held | {"gpt_neox.layers.0.attention.masked_bias": np.zeros(1, np.float32)}

    model, params = drawn("gpt_neox")
    folder = rewritten(tmp_path, model, jax.tree.map(jnp.asarray, params), change)
    jax.tree.map(np.testing.assert_array_equal, load_params(model, folder, param_dtype="float32"), params)


@pytest.mark.parametrize("older", [True, False])
def test_other_parts_of_a_model_that_reads_images_are_left_out(drawn, tmp_path, older):
    def change(held):
        renamed = {"vision_tower.x" if older else "model.vision_tower.x": np.zeros(3, np.float32)}
        for name, value in held.items():
            inside = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
            renamed["language_model." + name if older else inside] = value
        return renamed

    model, params = drawn("mistral")
    file = MULTIMODAL_FILES["mistral3_multimodal"]
    folder = rewritten(tmp_path, model, jax.tree.map(jnp.asarray, params), change, file)
    assert read_config(folder) == model.config
    jax.tree.map(np.testing.assert_array_equal, load_params(model, folder, param_dtype="float32"), params)


def test_tensors_have_the_names_of_their_family():
    prefix = "model.layers.1."
    names = {name: set(expected_shapes(read(FILES[name]))) for name in ("mistral", "qwen2", "qwen3", "gemma2")}
    added = {
        name: {tensor.removeprefix(prefix) for tensor in tensors - names["mistral"] if tensor.startswith(prefix)}
        for name, tensors in names.items()
    }
    assert added["qwen2"] == {f"self_attn.{letter}_proj.bias" for letter in "qkv"}
    assert added["qwen3"] == {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in expected_shapes(read(FILES["mixtral"]))
    assert expected_shapes(read(FILES["olmoe"]))["model.layers.0.mlp.experts.7.down_proj.weight"] == (32, 48)
    assert added["gemma2"] == {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}


@pytest.mark.parametrize("name", FILES)
def test_every_parameter_can_be_sharded_over_a_mesh(name):
    model = Model.create(read(FILES[name]))

    def check(leaf, axes):
        assert len(axes) == leaf.ndim and set(axes) <= set(PARAMETER_RULES)

    jax.tree.map(check, model.abstract_params("float32"), model.logical_axes())


def test_norms_start_at_one_and_biases_at_zero():
    x = np.random.default_rng(0).normal(0, 3, (2, 8)).astype("f")
    for offset in (0.0, 1.0):
        norm = RMSNorm((8,), ("embed",), eps=0.0, offset=offset)
        assert norm.scale[...][0] == 1 - offset
        close(np.square(norm(x)).mean(-1), np.ones(2))
    linear = Linear((3, 4), ("embed", "mlp"), scale=1.0, dtype=np.float32, rngs=nnx.Rngs(0), has_bias=True)
    assert linear.bias.get_metadata("axes") == ("mlp",) and not linear.bias[...].any()


# ------------------------------------------------------------------------------------------------ forward pass


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mixtral", "olmoe"])
def test_decoding_past_the_window_gives_the_hidden_states_of_the_whole_sequence(drawn, name):
    model, params = drawn(name)
    tokens = draw_tokens(1, 2, 20)
    expected = hidden_states(model, params, tokens, *whole_rows(tokens))
    decode = jax.jit(model.decode)
    cache = model.init_cache(2, 20)
    for start in range(0, 20, 4):
        part = np.s_[:, start : start + 4]
        hidden, cache = decode(params, cache, tokens[part], whole_rows(tokens)[1][part])
        close(hidden, expected[part], atol=1e-4)


def test_sequences_packed_in_a_row_have_windows_of_their_own(drawn):
    model, params = drawn("gemma3")
    tokens = draw_tokens(1, 2, 20)
    tokens[1, :12] = tokens[0, 8:]
    # Sequences of 8 and 12 tokens in the first row; the second of them by itself in the second row.
    segments, positions = np.array([[1] * 8 + [2] * 12, [1] * 12 + [0] * 8]), np.tile(np.arange(20), (2, 1))
    positions[0, 8:] -= 8
    packed = hidden_states(model, params, tokens, segments, positions)
    close(packed[0, 8:], packed[1, :12], atol=1e-4)


def test_a_token_is_seen_through_windows_as_far_as_the_layers_carry_it(drawn):
    tokens = np.tile(draw_tokens(1, 1, 20), (2, 1))
    tokens[1, 0] = (tokens[1, 0] + 1) % 64
    reach = 1 + 3 * (WINDOW - 1)  # each of three local layers carries it WINDOW - 1 further
    for name, last in (("mistral", reach), ("gemma2", 20)):
        before, after = hidden_states(*drawn(name), tokens, *whole_rows(tokens))
        moved = np.abs(np.asarray(before - after)).max(axis=-1) > 0
        assert moved[:last].all() and not moved[last:].any()


def test_the_soft_cap_of_logits_is_applied_wherever_logits_are_made(drawn):
    model, params = drawn("gemma2")
    hidden = 3 * np.random.default_rng(0).standard_normal((2, 6, 32)).astype("f")
    targets = draw_tokens(0, 2, 6)
    bare = hidden.astype(np.float64) @ np.asarray(params["embed"]["table"], np.float64).T
    assert np.abs(bare).max() > 5
    capped = 3 * np.tanh(bare / 3)
    close(model.logits(params, hidden), capped, rtol=1e-4)
    expected = np.take_along_axis(capped - np.log(np.exp(capped).sum(-1, keepdims=True)), targets[..., None], -1)
    params, hidden, targets = jax.tree.map(jnp.asarray, (params, hidden, targets))
    close(model.token_logps(params, hidden, targets), expected[..., 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "length", "branches"),
    [("mistral", 8, 0), ("qwen2", 8, 0), ("gemma2", 8, 1), ("gemma2", WINDOW, 0), ("gemma3", WINDOW, 0)],
)
def test_models_whose_layers_are_all_alike_have_no_branches(name, length, branches):
    model = Model.create(read(FILES[name]), remat="none", layout=Layout(attention=dense_attention))
    tokens = draw_tokens(1, 1, length)
    forward = lambda params: model.hidden_states(params, tokens, *whole_rows(tokens))  # noqa: E731
    assert str(jax.make_jaxpr(forward)(model.abstract_params("float32"))).count("cond[") == branches
