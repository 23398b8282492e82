"""Decoders in Flax, and reading and writing their weights."""
