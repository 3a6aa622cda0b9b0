"""A study as jobs of Slurm, or of this machine: sent, queued again, watched, brought home."""
