"""A trained model on rows of data: predictions, modality probe, baselines, result files.

Knows trained models and prepared data, no studies. Start with `evaluation.py` (all metrics of one model),
`predictor.py` (`modis_dist.load`) and `results.py` (the files of a training).
"""
