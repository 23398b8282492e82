"""Chatting with a model, pressing thumbs on its answers, and training on them: what `kto_jax.chat` is made of."""
