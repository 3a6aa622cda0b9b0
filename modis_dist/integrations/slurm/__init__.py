"""Slurm through submitit: submissions, job scripts, queue, status, and results copied back.

What a job trains is decided in `study` and `execution`. Start with `submission.py` (submit, resume), then `array.py`
and `allocation.py` (what jobs run) and `submission_status.py` (what `status` reads).
"""
