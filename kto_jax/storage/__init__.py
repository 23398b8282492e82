"""Fetching models and data, and writing files."""
