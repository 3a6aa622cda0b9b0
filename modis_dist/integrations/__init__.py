"""Adapters to Ray, MLflow, Slurm (submitit) and the readiness checks of `doctor`.

The only layer that may import ray, mlflow or submitit. Adapters only translate; decisions about trials, packs and
results belong to `study` and `execution`. `rendezvous.py` is shared by the adapters for several nodes.
"""
