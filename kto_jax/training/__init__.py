"""A training run: its inputs, state, step, loop and folder."""
