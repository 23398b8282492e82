import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.experts_on_mesh import MeshExperts
from kto_jax.devices.sharding import check_experts, make_mesh
from kto_jax.models.dispatch import run_experts_of_rows
from kto_jax.models.lora import AdaptedMatrix, Adapter

ROWS, LENGTH, EMBED, WIDTH, EXPERTS, PER_TOKEN = 3, 5, 8, 8, 8, 2


def arrays():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(0, 1, shape), "f")  # noqa: E731
    # One expert of every token may be none, as for padding.
    chosen = jnp.asarray(random.integers(0, EXPERTS + 1, (ROWS, LENGTH, PER_TOKEN)), jnp.int32)
    matrices = {
        "gate": draw(EXPERTS, EMBED, WIDTH),
        "up": AdaptedMatrix(
            draw(EXPERTS, EMBED, WIDTH), Adapter(draw(EXPERTS, EMBED, 2), draw(EXPERTS, 2, WIDTH)), 0.5
        ),
        "down": AdaptedMatrix(
            draw(EXPERTS, WIDTH, EMBED), Adapter(draw(EXPERTS, WIDTH, 2), draw(EXPERTS, 2, EMBED)), 0.5
        ),
    }
    return draw(ROWS, LENGTH, EMBED), chosen, jnp.abs(draw(ROWS, LENGTH, PER_TOKEN)), matrices


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        *(
            pytest.param(mesh, marks=pytest.mark.nightly)
            for mesh in (
                MeshConfig(data=1, expert=8),
                MeshConfig(sequence=2, expert=2),
            )
        ),
    ],
)
def test_experts_over_a_mesh_give_the_sums_and_gradients_of_one_device(mesh):
    x, chosen, shares, matrices = arrays()

    def total(run):
        def loss(x, shares, matrices):
            out = run(x, chosen, shares, matrices, jax.nn.silu)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, shares, matrices)

    (_, expected), gradient = total(run_experts_of_rows)
    (_, got), over_mesh = total(MeshExperts(make_mesh(mesh)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), over_mesh, gradient)


def test_an_expert_axis_must_divide_the_experts():
    sizes = {"expert": 4}
    check_experts(8, sizes)
    check_experts(0, {"expert": 1})
    with pytest.raises(ConfigError, match=r"expert=4 cannot divide the model's 6 experts \(6 % 4 = 2\)"):
        check_experts(6, sizes)
    with pytest.raises(ConfigError, match=r"the model has no experts.*Set config.mesh.fsdp instead"):
        check_experts(0, sizes)
