"""Tests of kto_jax.exports."""
