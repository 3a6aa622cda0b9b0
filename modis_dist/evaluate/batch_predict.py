"""Write predictions of a trained model on the rows of a store to one Parquet file, batch by batch."""

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

Predict = Callable[["pd.DataFrame", str], "pd.DataFrame"]  # (features of a batch of rows, modality) -> predictions
Progress = Callable[[int, int], None]  # rows done, total rows


def apply_to_store(
    model: Predictor, store: Store, *, out: Path, predict: Predict, only: Sequence[str] | None, progress: Progress
) -> None:
    """Write predictions for all rows of the model's modalities, or of the modalities ``only``, to ``out``.

    Columns ``modality`` and ``sample_id`` come first. Only one batch of rows is in memory; ``out`` is replaced when the
    file is complete. Raises ``DataError`` if the store has no such rows or the folder of ``out`` does not exist.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.suffix != ".parquet":
        raise DataError(f"{shown(str(out))}: must end in .parquet")
    if store.path.resolve() in out.resolve().parents:
        raise DataError(f"{shown(str(out))}: is inside the store; choose another folder")
    if not out.parent.is_dir():
        raise DataError(f"{shown(str(out))}: the folder {shown(str(out.parent))} does not exist; create it first")
    modalities = _modalities(model, store, only)
    done, rows = 0, sum(store.rows(modality) for modality in modalities)
    if rows == 0:
        raise DataError(f"{shown(str(store.path))}: has no rows of {', '.join(shown(m) for m in modalities)}")
    with new_file(out) as stream, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for result in _results(store, modalities, predict):
            table = pa.Table.from_pandas(result, preserve_index=False)
            writer = writer or stack.enter_context(pq.ParquetWriter(stream, table.schema))
            writer.write_table(table)
            done += len(result)
            progress(done, rows)


def _modalities(model: Predictor, store: Store, only: Sequence[str] | None) -> list[str]:
    """Return the modalities to predict. Raises ``DataError`` if the store lacks one."""
    modalities = list(only or (m for m in store.modalities if m in model.modalities))
    missing = [m for m in modalities if m not in store.modalities]
    if missing or not modalities:
        name = shown(missing[0]) if missing else "of the model's modalities"
        raise DataError(f"{shown(str(store.path))}: has no modality {name}; it has {', '.join(store.modalities)}")
    return modalities


def _results(store: Store, modalities: Sequence[str], predict: Predict) -> Iterator["pd.DataFrame"]:
    import pandas as pd

    for modality in modalities:
        for index, x in store.batches(modality):
            result = predict(pd.DataFrame(x, columns=list(store.features(modality))), modality)
            result.insert(0, "modality", modality)
            result.insert(1, "sample_id", index.sample_id)
            yield result
