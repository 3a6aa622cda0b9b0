"""Losses as pure functions of tensors. They know no model, no device and no configuration."""
