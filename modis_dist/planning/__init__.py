"""Cost estimates of a study or submission before it starts: trials, packs, steps, time, memory, disk, warnings.

Used by every `--dry-run`. Nothing here trains for longer than a short timing or writes to a run folder; printing
belongs to `cli`. Start with `estimate.py` (a study) and `submission.py` (its jobs); `timing.py` times steps on this
machine.
"""
