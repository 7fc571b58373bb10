"""Benchmarks: `accuracy` and `speed` of this project, the `published` comparison, and the `results` of all."""
