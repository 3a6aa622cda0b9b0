"""Execution of one pack or one run on this machine, and its limits: memory, disk, cores.

`run_pack.py` runs every training, whoever starts it. Comparing trials belongs to `study`, the training loop to `train`.
Start with `trial.py` and `run_pack.py`.
"""
