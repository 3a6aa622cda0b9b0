"""Adapters to Ray, MLflow, Slurm (submitit) and the readiness checks of `doctor`.

The only layer that may import ray, mlflow or submitit. Each adapter translates; decisions about trials, packs and
results belong to `study` and `execution`. `rendezvous.py` is what adapters for several nodes share.
"""
