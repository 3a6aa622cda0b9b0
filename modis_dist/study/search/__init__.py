"""Studies that are not a plain grid: random and Optuna search, pruning at rungs.

Grid searches do not use this package. Start with `run.py`; `decisions.py` stores proposals and pruning decisions, so
that a resumed search repeats them.
"""
