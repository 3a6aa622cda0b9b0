"""Tables, figures and Markdown reports of finished trainings and studies.

Reads results; computes no metric and chooses nothing. Start with `study.py`.
"""
