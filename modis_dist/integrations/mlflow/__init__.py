"""MLflow as a view of run folders: runs, metrics, models, and `modis-dist ui`.

The run folder is the source of truth; nothing here is needed for training. Start with `study.py`.
"""
