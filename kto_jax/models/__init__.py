"""Decoders of the Llama, Mistral, Qwen and Gemma families: architecture, loading and export of weights."""
