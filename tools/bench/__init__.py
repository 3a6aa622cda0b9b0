"""Benchmarks of modis_dist against a plain implementation of the published method: `python -m tools.bench`."""
