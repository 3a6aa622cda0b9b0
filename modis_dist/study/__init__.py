"""A study: trials, packs, search, selection on validation rows, refit, test, summary.

Knows no Ray, MLflow or Slurm: an executor passed in trains the packs. Start with `run.py` (a study from start to end),
then `manifest.py` (the list of trials) and `summary.py` (what it leaves).
"""
