"""`modis-dist predict`, `embed` and `translate`: a trained model on the rows of a store, into a Parquet file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import ModelFolder, StoreFolder

if TYPE_CHECKING:
    import pandas as pd

    from modis_dist.train.predictor import Predictor

Out = Annotated[
    Path, typer.Option("--out", metavar="F.parquet", help="File to write.", show_default=False, dir_okay=False)
]


def predict(directory: ModelFolder, store: StoreFolder, out: Out) -> None:
    """Class and probability of every row of the model's modalities.

    Example: `modis-dist predict runs/quickstart mystore --out classes.parquet`
    """
    _write(directory, store, out, lambda model, frame, modality: model.predict(frame, modality=modality))


def embed(directory: ModelFolder, store: StoreFolder, out: Out) -> None:
    """Latent means of every row of the model's modalities.

    Example: `modis-dist embed runs/quickstart mystore --out latent.parquet`
    """
    _write(directory, store, out, lambda model, frame, modality: model.embed(frame, modality=modality))


def translate(
    directory: ModelFolder,
    store: StoreFolder,
    out: Out,
    source: Annotated[str, typer.Option("--from", metavar="A", help="Modality of the rows.", show_default=False)],
    target: Annotated[str, typer.Option("--to", metavar="B", help="Modality to decode.", show_default=False)],
) -> None:
    """Features of modality B decoded from the rows of modality A, in the units of the data.

    Example: `modis-dist translate runs/quickstart mystore --from mirna --to rppa --out rppa.parquet`
    """
    _write(
        directory,
        store,
        out,
        lambda model, frame, modality: model.translate(frame, source=modality, target=target),
        only=[source],
    )


def _write(
    directory: Path,
    store: Path,
    out: Path,
    work: "Callable[[Predictor, pd.DataFrame, str], pd.DataFrame]",
    *,
    only: Sequence[str] | None = None,
) -> None:
    """Stream the store through the model; the file appears when it is whole."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    import modis_dist
    from modis_dist.data.store import Store
    from modis_dist.errors import DataError, shown

    model, opened = modis_dist.load(directory), Store.open(store)
    modalities = only or [m for m in opened.modalities if m in model.modalities]
    missing = [m for m in modalities if m not in opened.modalities]
    if missing or not modalities:
        asked = shown(missing[0]) if missing else "of the model's modalities"
        raise DataError(f"{store}: has no modality {asked}; it has {', '.join(opened.modalities)}")
    temporary = out.with_name(f".{out.name}.tmp")
    writer: pq.ParquetWriter | None = None
    try:
        for modality in modalities:
            for index, x in opened.batches(modality):
                frame = pd.DataFrame(x, columns=list(opened.features(modality)))
                result = work(model, frame, modality)
                result.insert(0, "modality", modality)
                result.insert(1, "sample_id", index.sample_id)
                table = pa.Table.from_pandas(result, preserve_index=False)
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
        if writer is not None:
            writer.close()
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    typer.echo(f"wrote {out}")
