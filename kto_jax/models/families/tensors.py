"""Names of tensors in a Hugging Face directory: the tables that families share.

A table maps the name of a parameter, "a.b.c" for params["a"]["b"]["c"], to a `Tensor`. It may contain parameters that a
particular model lacks, such as the output head of a model with a tied head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

LAYER = "model.layers.{}."
Fused = Literal["no", "blocks", "heads"]


class Tensor(NamedTuple):
    """A tensor of a Hugging Face directory, and how its layout differs from the parameter's.

    Attributes:
      name: its name; the first "{}" stands for the layer's index, a second for the expert's.
      transposed: whether it is stored as [out, in]; the parameter is [in, out].
      is_row: whether it is stored as [1, n]; the parameter is [n].
      fused: how the outputs of several parameters share a tensor, which all of them name: "blocks", one parameter
        after the other in the order of the table; "heads", one head of each in turn; "no".
    """

    name: str
    transposed: bool = False
    is_row: bool = False
    fused: Fused = "no"

    @property
    def num_stacked(self) -> int:
        """How many axes of the parameter stack such tensors: 1 if every layer has one, 2 if every expert has one."""
        return self.name.count("{}")

    @property
    def is_stacked(self) -> bool:
        """Whether every layer has one, or several; the parameter stacks them."""
        return self.num_stacked > 0

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the parameter's (of one layer or expert)."""
        return (1, *shape) if self.is_row else shape[::-1] if self.transposed else shape

    def index_in_file(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The tensor's index for a part of the parameter (of one layer)."""
        return (slice(0, 1), *index) if self.is_row else index[::-1] if self.transposed else index

    def from_file(self, values: np.ndarray) -> np.ndarray:
        """A part of the tensor in the parameter's layout."""
        return values[0] if self.is_row else values.T if self.transposed else values

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """The parameter (of one layer) in the tensor's layout."""
        return values[None] if self.is_row else values.T if self.transposed else values


DECODER = {
    "embed.table": Tensor("model.embed_tokens.weight"),
    "final_norm.scale": Tensor("model.norm.weight"),
    "head.weight": Tensor("lm_head.weight", transposed=True),
    "layers.attention_norm.scale": Tensor(LAYER + "input_layernorm.weight"),
    "layers.attention.query.weight": Tensor(LAYER + "self_attn.q_proj.weight", transposed=True),
    "layers.attention.key.weight": Tensor(LAYER + "self_attn.k_proj.weight", transposed=True),
    "layers.attention.value.weight": Tensor(LAYER + "self_attn.v_proj.weight", transposed=True),
    "layers.attention.output.weight": Tensor(LAYER + "self_attn.o_proj.weight", transposed=True),
    "layers.mlp_norm.scale": Tensor(LAYER + "post_attention_layernorm.weight"),
    "layers.mlp.gate.weight": Tensor(LAYER + "mlp.gate_proj.weight", transposed=True),
    "layers.mlp.up.weight": Tensor(LAYER + "mlp.up_proj.weight", transposed=True),
    "layers.mlp.down.weight": Tensor(LAYER + "mlp.down_proj.weight", transposed=True),
    "scorer.weight": Tensor("score.weight", is_row=True),
}
"""A decoder with one norm before attention and one before the feed-forward layer."""

QKV_BIASES = {
    "layers.attention.query.bias": Tensor(LAYER + "self_attn.q_proj.bias"),
    "layers.attention.key.bias": Tensor(LAYER + "self_attn.k_proj.bias"),
    "layers.attention.value.bias": Tensor(LAYER + "self_attn.v_proj.bias"),
}
QK_NORMS = {
    "layers.attention.query_norm.scale": Tensor(LAYER + "self_attn.q_norm.weight"),
    "layers.attention.key_norm.scale": Tensor(LAYER + "self_attn.k_norm.weight"),
}
