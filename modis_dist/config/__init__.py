"""Typed configuration of runs, studies and site profiles, read from strict YAML.

Imports neither torch nor numpy. Start with `run.py` (every key of a run) and `parse.py` (YAML to a frozen tree).
"""
