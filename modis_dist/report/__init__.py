"""Tables, figures and Markdown reports of finished trainings and studies.

Reads results; computes no metric and chooses nothing. Start with `study.py`; `study_results.py` has
the types of `summary.json`.
"""
