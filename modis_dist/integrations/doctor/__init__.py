"""Readiness checks of this machine and of a cluster, each with a fix, for `modis-dist doctor`.

Start with `checks.py`, which runs the checks in order; `machine.py` has those of this machine, `all_reduce.py` is one
process of the all-reduce.
"""
