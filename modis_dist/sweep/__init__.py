"""Sweeps: which trials there are, which are trained together, what they add up to. Knows no ray, mlflow or submitit."""
