"""Files, locks, processes, signals, errors and version: for use in every layer.

Independent of omics and training. Start with `errors.py` (exit codes) and `files.py` (atomic, private files).
"""
