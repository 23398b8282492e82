"""Sampling completions from a model."""
