"""Readiness checks of this machine and of a cluster, each with a fix, for `modis-dist doctor`.

Start with `checks.py`, which lists the checks in order. Checks of Slurm itself are in `integrations/slurm`.
"""
