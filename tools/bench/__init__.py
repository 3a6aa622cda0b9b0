"""Measurements of training, side by side with a plain implementation of what was published: `python -m tools.bench`."""
