"""From files to the rows, labels and features a training learns from.

`importers` read what people have, `store` is the format on disk; `split`, `scenario` and `preprocess` prepare rows.
Everything that learns something is fitted on training rows only. Start with `store/reader.py`.
"""
