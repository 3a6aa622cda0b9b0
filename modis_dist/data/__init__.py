"""Rows and columns: the store, importers, simulator, splits, scenarios, preprocessing. No torch below ``loader``."""
