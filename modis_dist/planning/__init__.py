"""Cost of a study or submission before it starts: trials, packs, time, memory, disk, warnings.

Serves every `--dry-run`. Nothing here trains more than a short probe or writes to a run folder; printing belongs to
`cli`. Start with `estimate.py`.
"""
