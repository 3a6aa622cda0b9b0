"""MLflow as a view of run folders: runs, metrics, models, and `modis-dist ui`.

The run folder is the source of truth; MLflow is a view of it, and no training depends on it. Start with `sync.py`
(one idempotent function), then `follower.py` (the process that `tune` starts).
"""
