"""The store: Parquet shards per modality with a manifest and checksums.

Reading (`reader.py`), writing (`writer.py`), rules for names and ids (`rules.py`), summary and verification
(`coverage.py`). Formats of other programs belong to `data/importers`. Start with `reader.py`.
"""
