"""Tables, figures and Markdown reports of finished trainings and studies.

Reads results; computes no metrics and selects nothing. Start with `study.py`; `study_results.py` has the types of
`summary.json`.
"""
