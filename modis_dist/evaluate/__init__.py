"""A trained model on rows of data: predictions, modality probe, baselines, result files.

Knows trained models and prepared data, no sweeps. Start with `evaluation.py` (all metrics of one model) and
`predictor.py` (`modis_dist.load`).
"""
