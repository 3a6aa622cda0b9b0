"""A study: trials, packs, search, selection on validation rows, refit, test, summary.

Independent of Ray, MLflow and Slurm: an executor passed in trains the packs. Start with `run.py` (a study from start to
end), then `manifest.py` (the list of trials) and `summary.py` (the output files).
"""
