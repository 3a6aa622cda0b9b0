"""One pack or one run, trained on this machine, and what limits it: memory, disk, cores.

`run_pack.py` is how every training is run, whoever starts it. Comparing trials belongs to `study`; the training loop
to `train`. Start with `trial.py` and `run_pack.py`.
"""
