"""The store: Parquet shards per modality with a manifest and checksums.

Reading (`reader.py`), writing (`writer.py`), what must hold of names and ids (`rules.py`), coverage tables. Formats
of other programs belong to `data/importers`. Start with `reader.py`.
"""
