"""Training one stack: loop, batches, validation, checkpoints, journal, exact resume.

Knows no terminal, Ray, MLflow or Slurm: `callbacks.py` is its interface to them. Start with `loop.py::fit`.
"""
