"""Directories that bitsandbytes quantised to four bits, written here by its formulas in NumPy."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.four_bits import NF4_LEVELS
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.stored_dtype import common_dtype, stored_dtype
from tests.models.conftest import draw_params

CONFIG = TransformerConfig(
    vocab_size=64, embed_dim=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64, mlp_dim=192,
    initializer_range=0.05, bos_id=1, eos_ids=(2,),
)  # fmt: skip
# Any 256 rising numbers: the file states them.
NF4 = np.array(NF4_LEVELS, np.float32)
NESTED_LEVELS = np.linspace(-1, 1, 256, dtype=np.float32)
GATE = "model.layers.1.mlp.gate_proj.weight"


def nearest(values, levels):
    return np.abs(values[..., None] - levels).argmin(axis=-1)


def quantised(weight, *, block, is_nested, levels=NF4):
    """The tensors of a matrix, by ending, and the weights that they stand for."""
    blocks = weight.astype(np.float32).reshape(-1, block)
    scales = np.abs(blocks).max(axis=1)
    codes = nearest(blocks / scales[:, None], levels).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {"": (codes.reshape(-1)[::2] << 4 | codes.reshape(-1)[1::2])[:, None], ".quant_map": levels}
    parts[".absmax"] = scales
    if is_nested:
        offset = scales.mean(dtype=np.float32)
        padded = np.resize(scales - offset, (-(-len(scales) // 256), 256))
        nested = np.abs(padded).max(axis=1)
        parts[".absmax"] = nearest(padded / nested[:, None], NESTED_LEVELS).reshape(-1)[: len(scales)].astype(np.uint8)
        parts |= {".nested_absmax": nested, ".nested_quant_map": NESTED_LEVELS}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        scales = NESTED_LEVELS[parts[".absmax"]] * np.repeat(nested, 256)[: len(scales)] + offset
    parts[".quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts, (levels[codes] * scales[:, None]).reshape(weight.shape)


def write(folder, *, block=64, is_nested=False, dtype="bfloat16", leave_out="", **options):
    """A model directory with its layers' matrices in four bits, and the weights that it stands for."""
    model = Model.create(CONFIG, remat="none")
    save_hugging_face(folder, model, draw_params(model), tokenizer_dir=None, model_card="", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    whole = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    for name in [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]:
        parts, whole[name] = quantised(whole[name], block=block, is_nested=is_nested, **options)
        del tensors[name]
        tensors |= {name + part: np.ascontiguousarray(value) for part, value in parts.items()}
    save_file({name: value for name, value in tensors.items() if name != leave_out}, folder / "model.safetensors")
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(values))
    return model, whole


@pytest.mark.parametrize(("block", "is_nested"), [(64, False), (64, True), (256, False)])
def test_a_directory_in_four_bits_is_read_with_the_weights_that_it_stands_for(block, is_nested, tmp_path):
    model, whole = write(tmp_path / "m", block=block, is_nested=is_nested)
    assert read_config(tmp_path / "m").embed_dim == 128
    params = load_params(model, tmp_path / "m", param_dtype="float32")
    got = params["layers"]["mlp"]["gate"]["weight"][1]
    np.testing.assert_allclose(got, whole[GATE].T, rtol=1e-6)
    assert np.abs(got).max() > 0.05
    np.testing.assert_array_equal(params["embed"]["table"], whole["model.embed_tokens.weight"])
    # On a mesh, each device reads the rows of its own shard.
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    spread = load_params(model, tmp_path / "m", param_dtype="float32", shardings=layout)
    jax.tree.map(np.testing.assert_array_equal, spread, params)


@pytest.mark.parametrize("is_nested", [False, True])
def test_its_nf4_is_ours_to_the_bit(is_nested, tmp_path):
    model, whole = write(tmp_path / "m", is_nested=is_nested)
    assert (stored_dtype(tmp_path / "m"), common_dtype(tmp_path / "m")) == ("nf4", "bfloat16")
    kept = load_params(model, tmp_path / "m", param_dtype="nf4")["layers"]["mlp"]["gate"]["weight"]
    stored = load_file(tmp_path / "m" / "model.safetensors")[GATE]
    np.testing.assert_array_equal(kept.nf4[1].T.reshape(-1), stored[:, 0])
    np.testing.assert_allclose(kept.astype("float32")[1], whole[GATE].T, rtol=1e-6)


@pytest.mark.parametrize("options", [
    {"block": 128}, {"dtype": "float32"}, {"levels": np.linspace(-1, 1, 16, dtype=np.float32)},
])  # fmt: skip
def test_weights_that_nf4_does_not_hold_exactly_are_kept_in_float32(options, tmp_path):
    model, whole = write(tmp_path / "m", **options)
    assert stored_dtype(tmp_path / "m") == "float32"
    params = load_params(model, tmp_path / "m", param_dtype="float32")
    np.testing.assert_allclose(params["layers"]["mlp"]["gate"]["weight"][1], whole[GATE].T, rtol=1e-6)


def test_a_matrix_without_one_of_its_parts_and_a_damaged_description_are_refused(tmp_path):
    model, _ = write(tmp_path / "m", leave_out=f"{GATE}.absmax")
    with pytest.raises(ConfigError, match=r"gate_proj.weight.absmax missing \(expected \(384,\)\).*all of its parts"):
        load_params(model, tmp_path / "m", param_dtype="float32")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{GATE}.quant_state.bitsandbytes__nf4"] = np.frombuffer(b'{"shape": [192]}', np.uint8)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"gate_proj.weight.quant_state.*does not describe a matrix.*Download"):
        load_params(model, tmp_path / "m", param_dtype="float32")
