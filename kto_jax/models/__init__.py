"""Decoders of the Llama, Mistral, Qwen and Gemma families: architecture, weights in and out."""
