"""A trained model on the rows of a store, a batch at a time, into one Parquet file. Knows no terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from modis_dist.data.store.reader import Store
from modis_dist.evaluate.predictor import Predictor
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import new_file
from modis_dist.runtime.text import shown

if TYPE_CHECKING:
    import pandas as pd

Work = Callable[["pd.DataFrame", str], "pd.DataFrame"]  # features of some rows, and their modality
Told = Callable[[int, int], None]  # rows done, rows in all


def apply_to_store(
    model: Predictor, store: Store, *, out: Path, work: Work, only: Sequence[str] | None, told: Told
) -> None:
    """Write what ``work`` makes of the rows of the model's modalities, or of ``only`` some; ``out`` is replaced.

    Columns ``modality`` and ``sample_id`` come first. Memory is bounded by a batch of rows, and the file appears when
    it is whole. Raises ``DataError`` where the store has no such rows or the folder of ``out`` is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.suffix != ".parquet":
        raise DataError(f"{shown(str(out))}: a Parquet file is written; let its name end in .parquet")
    if store.path.resolve() in out.resolve().parents:
        raise DataError(f"{shown(str(out))}: is inside the store; write elsewhere")
    if not out.parent.is_dir():
        raise DataError(f"{shown(str(out))}: the folder {shown(str(out.parent))} is not there; make it first")
    modalities = _chosen(model, store, only)
    done, rows = 0, sum(store.rows(modality) for modality in modalities)
    if rows == 0:
        raise DataError(f"{shown(str(store.path))}: has no rows of {', '.join(shown(m) for m in modalities)}")
    with new_file(out) as stream, ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for result in _results(store, modalities, work):
            table = pa.Table.from_pandas(result, preserve_index=False)
            writer = writer or opened.enter_context(pq.ParquetWriter(stream, table.schema))
            writer.write_table(table)
            done += len(result)
            told(done, rows)


def _chosen(model: Predictor, store: Store, only: Sequence[str] | None) -> list[str]:
    """The modalities to go through. Raises ``DataError`` where the store lacks them."""
    chosen = list(only or (m for m in store.modalities if m in model.modalities))
    missing = [m for m in chosen if m not in store.modalities]
    if missing or not chosen:
        asked = shown(missing[0]) if missing else "of the model's modalities"
        raise DataError(f"{shown(str(store.path))}: no modality {asked}; known: {', '.join(store.modalities)}")
    return chosen


def _results(store: Store, modalities: Sequence[str], work: Work) -> Iterator["pd.DataFrame"]:
    import pandas as pd

    for modality in modalities:
        for index, x in store.batches(modality):
            result = work(pd.DataFrame(x, columns=list(store.features(modality))), modality)
            result.insert(0, "modality", modality)
            result.insert(1, "sample_id", index.sample_id)
            yield result
