"""Exporting any checkpoint of a run: as a model, as adapters, as a GGUF file, to the Hub."""
