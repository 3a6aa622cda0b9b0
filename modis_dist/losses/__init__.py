"""Losses as pure functions of tensors, each with its source.

Independent of models, devices and configuration; `objective.py` combines them. Start with `table.py`.
"""
