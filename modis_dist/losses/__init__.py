"""Losses as pure functions of tensors, each with its source.

They know no model, device or configuration; `objective.py` combines them. Start with `adversarial.py`.
"""
