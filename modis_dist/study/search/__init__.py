"""Studies that are not a plain grid: random and Optuna search, pruning at rungs.

A grid passes through none of this. Start with `run.py`; `decisions.py` stores proposals and verdicts, so that a resumed
search makes the same ones.
"""
