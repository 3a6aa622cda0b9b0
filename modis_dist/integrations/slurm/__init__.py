"""Slurm: submissions, job scripts, queue, status, and results copied back.

The training itself is in `study` and `execution`. Start with `submit.py` (submit, resume, cancel), then `jobs.py` (the
work of a job), `queue.py` (the queue, the only user of submitit) and `submission_status.py` (the output of `status`).
"""
