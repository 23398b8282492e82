"""Online rounds: prompts, completions of the current policy, and the feedback made of them."""
