"""Checks shapes and types of arguments, results and dataclass fields while the tests run."""

from beartype import BeartypeConf, beartype

_CHECKED = """
losses objectives values models.heads models.four_bits models.int8 models.quantised models.lora models.rope
training.accumulate training.forward training.metrics training.microbatches training.step training.flops
"""
MODULES = [f"kto_jax.{name}" for name in _CHECKED.split()]
"""Modules that compute on JAX arrays alone: others also take NumPy arrays or stand-ins for arrays."""
# An int is a float too, as for mypy.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
