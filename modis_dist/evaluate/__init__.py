"""A trained model on rows of data: predictions, modality probe, baselines, result files.

Depends on trained models and prepared data, not on studies. Start with `evaluation.py` (all metrics of one model),
`predictor.py` (`modis_dist.load`) and `results.py` (the files of a training).
"""
