"""Readers of CSV, TSV, Parquet, AnnData and MuData, in bounded memory.

A reader returns `import_source.Source` objects; `convert.py` writes them to a store. Start with `convert.py`.
"""
