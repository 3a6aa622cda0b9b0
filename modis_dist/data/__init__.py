"""From files to the rows, labels and features of a training.

`importers` read tables, AnnData and MuData, `store` is the format on disk; `split`, `scenario` and `preprocess` prepare
rows. Preprocessing is fitted on training rows only. Start with `store/reader.py`.
"""
