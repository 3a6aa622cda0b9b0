"""MLflow as a view of run folders: runs, metrics, models, and `modis-dist ui`.

The run folder is the source of truth and MLflow a view of it; no training needs anything here. Start with `sync.py`
(one idempotent function), then `follower.py` (the process that `tune` starts).
"""
