"""Training one stack: loop, batches, validation, checkpoints, journal, exact resume.

Independent of terminal, Ray, MLflow and Slurm: `callbacks.py` is the interface to them. Start with `loop.py::fit`.
"""
