"""Collecting thumbs on answers."""
