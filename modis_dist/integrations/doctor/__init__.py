"""Readiness checks of this machine and of a cluster, with a fix for each problem, for `modis-dist doctor`.

Start with `checks.py`, which runs the checks in order; `machine.py` has the checks of this machine, `all_reduce.py` one
process of the all-reduce check.
"""
