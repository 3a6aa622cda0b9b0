"""Execution of one pack or one run on this machine, within its memory, disk and cores.

Every training runs in `run_pack.py`, however it was started. Comparison of trials belongs to `study`, the training loop
to `train`. Start with `trial.py` and `run_pack.py`.
"""
