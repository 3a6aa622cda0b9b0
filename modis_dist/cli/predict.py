"""`modis-dist predict`, `embed` and `translate`: apply a trained model to a store and write a Parquet file."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import OutputFolder, StoreFolder

if TYPE_CHECKING:
    import pandas as pd

    from modis_dist.evaluate.predictor import Predictor

Out = Annotated[
    Path, typer.Option("--out", metavar="F.parquet", help="Output file.", show_default=False, dir_okay=False)
]


def predict(directory: OutputFolder, store: StoreFolder, out: Out) -> None:
    """Predict class and probabilities for every row of the model's modalities.

    Example: `modis-dist predict runs/quickstart mystore --out classes.parquet`
    """
    _write(directory, store, out, lambda model, frame, modality: model.predict(frame, modality=modality))


def embed(directory: OutputFolder, store: StoreFolder, out: Out) -> None:
    """Compute the latent mean of every row of the model's modalities.

    Example: `modis-dist embed runs/quickstart mystore --out latent.parquet`
    """
    _write(directory, store, out, lambda model, frame, modality: model.embed(frame, modality=modality))


def translate(
    directory: OutputFolder,
    store: StoreFolder,
    out: Out,
    source: Annotated[str, typer.Option("--from", metavar="A", help="Source modality.", show_default=False)],
    target: Annotated[str, typer.Option("--to", metavar="B", help="Target modality.", show_default=False)],
) -> None:
    """Translate the rows of modality A to features of modality B, in the units of the data.

    Example: `modis-dist translate runs/quickstart mystore --from mirna --to rppa --out rppa.parquet`
    """
    _write(
        directory, store, out, lambda model, frame, _: model.translate(frame, source=source, target=target), [source]
    )


def _write(
    directory: Path,
    store: Path,
    out: Path,
    work: "Callable[[Predictor, pd.DataFrame, str], pd.DataFrame]",
    only: Sequence[str] | None = None,
) -> None:
    """Apply ``work`` to the store in batches, with a progress bar."""
    import modis_dist
    from modis_dist.cli.display import named_bars
    from modis_dist.data.store.reader import Store
    from modis_dist.evaluate.batch_predict import apply_to_store

    model, opened = modis_dist.load(directory), Store.open(store)
    with named_bars() as progress:
        apply_to_store(
            model, opened, out=out, predict=partial(work, model), only=only, progress=partial(progress, "rows")
        )
    typer.echo(f"wrote {out}")
