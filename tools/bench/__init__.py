"""Benchmarks of training against a plain implementation of the published method: `python -m tools.bench`."""
