"""Configurations of a study that are not a grid: random and Optuna search, pruning at rungs.

A grid passes through none of this. Start with `rounds.py`; `decisions.py` stores what was decided, so that a restarted
search proposes the same configurations.
"""
