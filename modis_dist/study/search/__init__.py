"""Algorithms of searches and pruning: random draws, Optuna's proposals, successive halving at rungs.

They train nothing: `study/search_state.py` applies them to a study and `study/run_search.py` trains the trials.
`decisions.py` stores proposals and pruning decisions, so that a resumed search repeats them. Start with `space.py`.
"""
