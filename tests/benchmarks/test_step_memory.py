"""What a step takes beside its arguments, by the compiler: one gradient, and little that grows with the weights."""

import dataclasses
from functools import cache

import jax
import pytest

from kto_jax.config import Config
from kto_jax.models.config import TransformerConfig
from kto_jax.objectives import check_objective
from kto_jax.planning.compile_step import Lengths, Task, compile_step
from kto_jax.planning.topology import Topology


@cache
def measure(num_layers=2, vocabulary=512):
    """Bytes beside the arguments, and of one gradient."""
    architecture = TransformerConfig(
        vocab_size=vocabulary, embed_dim=128, num_layers=num_layers, num_heads=2, num_kv_heads=1, head_dim=64,
        mlp_dim=512, tied_head=True,
    )  # fmt: skip
    plain = Config()
    data = dataclasses.replace(plain.data, max_length=16)
    reference = dataclasses.replace(plain.reference, param_dtype="float32")
    config = dataclasses.replace(plain, batch_size=1, microbatch_rows=1, row_length=16, data=data, reference=reference)
    topology = Topology("local", tuple(jax.devices()[:1]))
    task = Task(architecture, check_objective(config.objective))
    program = compile_step(config, task, topology, Lengths(total=16, completion=4))
    return program.temporaries, 4 * architecture.num_params()


def growth(larger):
    """Gradients that a larger model takes more, for each gradient by which it is larger."""
    (temporaries, gradient), (more_temporaries, more_gradient) = measure(), larger
    return (more_temporaries - temporaries) / (more_gradient - gradient)


@pytest.mark.nightly
def test_a_layer_more_costs_one_gradient_of_it():
    assert growth(measure(num_layers=12)) < 1.1


@pytest.mark.nightly
def test_a_token_more_in_the_vocabulary_costs_no_gradient_of_a_microbatch():
    assert growth(measure(vocabulary=16384)) < 2.6
