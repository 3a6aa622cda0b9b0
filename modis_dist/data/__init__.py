"""Data of a training: from source files to rows, labels and features.

`importers` reads tables, AnnData and MuData; `store` is the format on disk; `split`, `scenario` and `preprocess`
prepare rows. Preprocessing is fitted on training rows only. Start with `store/reader.py`.
"""
