"""Samples, model card and report: what a run leaves for people to read."""
