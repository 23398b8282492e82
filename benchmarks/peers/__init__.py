"""The contenders of `python -m benchmarks.kto`, each in its own process; peers also in their own environment."""
