import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import (
    check_heads,
    check_lengths,
    check_rows,
    make_mesh,
    mesh_shape,
    place_batch,
    shardings,
)
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model


def test_minus_one_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(fsdp=2), 8) == {"data": 4, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 1}
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "sequence": 2, "tensor": 2}
    assert mesh_shape(MeshConfig(1, -1, 2, 2), 8) == sizes


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=4, fsdp=4)])
def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused(config):
    with pytest.raises(ConfigError, match="does not multiply to the 8 devices"):
        mesh_shape(config, 8)


def test_rows_that_the_mesh_cannot_divide_are_refused_with_the_nearest_number():
    sizes = {"data": 4, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 1}
    check_rows(8, sizes)
    with pytest.raises(ConfigError, match=r"12 % 8 = 4.*data × fsdp = 8. Set config.microbatch_rows to 16"):
        check_rows(12, sizes)
    with pytest.raises(ConfigError, match=r"12 % 16 = 12.*data × fsdp × expert = 16. Set"):
        check_rows(12, sizes | {"expert": 2})


def test_devices_that_share_a_row_are_given_one_at_a_time():
    sizes = {"data": 2, "fsdp": 2, "expert": 1, "sequence": 2, "tensor": 1}
    check_rows(4, sizes)
    with pytest.raises(ConfigError, match=r"rows=8 does not go with config.mesh.sequence=2.*microbatch_rows to 4"):
        check_rows(8, sizes)


def test_rows_whose_tokens_the_sequence_axis_cannot_share_are_refused_with_the_nearest_length():
    check_lengths([64, 96], {"sequence": 4})
    with pytest.raises(ConfigError, match=r"rows of 30 tokens .*sequence=4 \(30 % 4 = 2\).*row_length to 32"):
        check_lengths([64, 30], {"sequence": 4})


def test_a_tensor_axis_that_would_cut_a_head_is_refused():
    check_heads(8, 4, {"tensor": 4, "sequence": 1})
    with pytest.raises(ConfigError, match=r"num_kv_heads=3 \(3 % 2 = 1\)"):
        check_heads(6, 3, {"tensor": 2, "sequence": 1})


def test_a_sequence_axis_with_more_devices_than_heads_is_refused():
    # Llama-3.1-8B: 4 query heads to each of 8 keys.
    for sequence in (2, 4, 8, 16, 32):
        check_heads(32, 8, {"tensor": 1, "sequence": sequence})
    check_heads(32, 8, {"tensor": 2, "sequence": 16})
    message = (
        r"sequence=32 cannot divide the 16 query and 4 key heads.*divisors of 4, and multiples of 4 that divide 16"
    )
    with pytest.raises(ConfigError, match=message):
        check_heads(32, 8, {"tensor": 2, "sequence": 32})
    with pytest.raises(ConfigError, match=r"sequence=6 cannot"):
        check_heads(32, 8, {"tensor": 1, "sequence": 6})


def test_parameters_are_sharded_by_their_logical_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = {"w": jax.ShapeDtypeStruct((3, 8, 4), np.float32)}
    layout = shardings(mesh, {"w": ("layers", "embed", "mlp")}, abstract)
    assert layout["w"].spec == PartitionSpec(None, ("fsdp", "expert", "sequence"), "tensor")


def test_a_dimension_that_does_not_divide_is_named_with_its_parameter():
    mesh = make_mesh(MeshConfig(fsdp=8))
    abstract = {"block": {"w": jax.ShapeDtypeStruct((12, 4), np.float32)}}
    with pytest.raises(ConfigError, match=r"block.w has embed=12, which cannot be split over 8 devices"):
        shardings(mesh, {"block": {"w": ("embed", "mlp")}}, abstract)


def test_a_batch_is_spread_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = place_batch(mesh, {"rows": np.arange(2 * 8 * 3).reshape(2, 8, 3), "count": np.int32(2)})
    assert {shard.data.shape for shard in placed["rows"].addressable_shards} == {(2, 2, 3)}
    assert placed["count"].sharding.is_fully_replicated


def test_only_the_data_axis_may_cross_from_one_slice_to_another():
    devices = [types.SimpleNamespace(platform="tpu", slice_index=i // 2) for i in range(4)]
    with pytest.raises(ConfigError, match=r"config\.mesh\.data=1 cannot be split over 2 slices.*Set config"):
        make_mesh(MeshConfig(data=1, fsdp=-1), devices)


@pytest.mark.parametrize(
    ("sizes", "gathered"),
    [
        # Parts of the vectors of all tokens, and the gradient of the whole table of 64.
        (MeshConfig(data=2, fsdp=4), r"f32\[192,8\]\S* all-gather|= .*f32\[64,32\].* all-reduce\("),
        (MeshConfig(data=1, fsdp=4, sequence=2), r"f32\[8,24,32\]\S* all-gather"),
    ],
)
def test_vectors_out_of_the_embedding_are_exchanged_not_gathered(sizes, gathered):
    config = TransformerConfig(
        vocab_size=64, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=48, tied_head=True
    )  # fmt: skip
    mesh = make_mesh(sizes)
    model = Model.create(config, layout=make_layout(mesh))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    tokens = jax.ShapeDtypeStruct((8, 24), np.int32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    loss = lambda params, *rows: (model.hidden_states(params, *rows) ** 2).sum()  # noqa: E731
    program = jax.jit(jax.grad(loss), in_shardings=(layout, *(tokens.sharding,) * 3), out_shardings=layout)
    text = program.lower(model.abstract_params("float32"), tokens, tokens, tokens).compile().as_text()
    assert "all-to-all" in text and not re.search(gathered, text)
