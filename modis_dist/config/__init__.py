"""Typed configuration of runs and studies. Knows nothing of torch, ray or mlflow."""
