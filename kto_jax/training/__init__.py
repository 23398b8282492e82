"""A training run: what it reads, its state, the step, the loop, its folder."""
