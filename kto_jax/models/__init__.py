"""Decoders of the Llama family: architecture, weights in and out."""
