"""Batches: which sequences each step reads, and how they are packed."""
