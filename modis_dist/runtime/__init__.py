"""Files, locks, processes, signals, errors and version: what every layer may use.

Knows nothing of omics or training. Start with `errors.py` (exit codes) and `files.py` (atomic, private files).
"""
