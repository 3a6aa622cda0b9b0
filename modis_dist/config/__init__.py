"""Typed configuration of runs, studies and site profiles, and the strict YAML that they are read from.

No torch or numpy is imported here. Start with `run.py` (every key of a run) and `parse.py` (YAML to a frozen tree).
"""
