"""Whether a run fits its devices, by compiling it."""
