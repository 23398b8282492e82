"""What `python -m benchmarks.kto` times, each in a process of its own; peers also in an environment of their own."""
