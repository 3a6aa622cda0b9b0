"""Readers of CSV, TSV, Parquet, AnnData and MuData, all in bounded memory.

Each yields an `import_source.Source`; `convert.py` writes it into a store. Start with `convert.py`.
"""
