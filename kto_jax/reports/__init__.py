"""Samples, model card and report of a run."""
