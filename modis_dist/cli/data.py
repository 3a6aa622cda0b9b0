"""The `modis-dist data` commands: import, check, describe, simulate."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, StoreFolder, print_json, say
from modis_dist.runtime.text import shown

if TYPE_CHECKING:
    from rich.table import Table

    from modis_dist.data.store.coverage import Coverage

app = typer.Typer(help="Import, check, describe and simulate data.", no_args_is_help=True)
simulate_app = typer.Typer(help="Simulate a data set.", no_args_is_help=True)
app.add_typer(simulate_app, name="simulate")

OutPath = Annotated[Path, typer.Option("--out", metavar="STORE", help="Store folder to create; must not exist.")]


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder of MODALITY.parquet, .csv, .tsv (.gz) or .h5ad files, or an .h5mu file."
        ),
    ],
    out: OutPath,
) -> None:
    """Import tables, AnnData or MuData into a store.

    Example: `modis-dist data import tables --out mystore`
    """
    from modis_dist.cli.display import named_bars
    from modis_dist.data.importers.convert import import_source

    with named_bars() as progress:
        import_source(source, out, progress=progress)
    _print_created(out)


@app.command()
def check(store: StoreFolder, as_json: Json = False) -> None:
    """Verify a store: shard hashes, page checksums, columns, values and ids.

    Example: `modis-dist data check mystore`
    """
    from modis_dist.cli.display import named_bars
    from modis_dist.data.store.coverage import verify

    with named_bars() as progress:
        verified = verify(store, progress=progress)
    modalities = {
        name: {"rows": table.rows, "features": len(table.features), "shards": len(table.shards)}
        for name, table in verified.tables.items()
    }
    if as_json:
        print_json({"store": str(store), "ok": True, "fingerprint": verified.fingerprint, "modalities": modalities})
        return
    for name, table in modalities.items():
        typer.echo(f"{name}: {table['rows']:,} rows, {table['features']:,} features, {table['shards']} shard(s): OK")
    typer.echo(f"{store}: OK, fingerprint {verified.fingerprint[:16]}")


@app.command()
def describe(store: StoreFolder, as_json: Json = False) -> None:
    """Summarise a store: rows per class and modality, labels, pairing, values and splits.

    Example: `modis-dist data describe mystore`
    """
    from modis_dist.cli.display import named_bars
    from modis_dist.data.store.coverage import measure
    from modis_dist.data.store.reader import Store

    with named_bars() as progress:
        coverage = measure(Store.open(store), progress=progress)
    if as_json:
        print_json(coverage.as_tree())
        return
    _print_coverage(coverage)


@simulate_app.callback()
def _simulate() -> None:
    """Simulate a data set."""


@simulate_app.command()
def intersim(
    out: OutPath,
    samples: Annotated[int, typer.Option(help="Number of samples, each with a row in all three modalities.")] = 500,
    classes: Annotated[int, typer.Option(help="Number of classes, of equal size.")] = 5,
    delta: Annotated[float, typer.Option(help="Mean shift of a differential feature.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 1234,
    reference: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the R package's reference tables (Parquet).")
    ] = None,
) -> None:
    """Simulate methylation, expression and protein with the InterSIM algorithm.

    Example: `modis-dist data simulate intersim --out mystore --samples 1000 --classes 4`
    """
    from modis_dist.config.parse import build
    from modis_dist.config.run import Run
    from modis_dist.data.simulate import simulate

    values = {"samples": samples, "classes": classes, "delta": delta, "seed": seed, "reference": reference}
    settings = build(Run, {"data": {"simulate": values}}, source="simulate intersim").data.simulate
    assert settings is not None
    simulate(settings, out)
    _print_created(out)


# --- printing -------------------------------------------------------------------------------------------------


def _print_created(out: Path) -> None:
    """Print the created store, its notices and the next command."""
    from modis_dist.data.store.reader import Store

    store = Store.open(out)
    for name in store.modalities:
        typer.echo(f"{name}: {store.rows(name):,} rows, {len(store.features(name)):,} features")
    for line in store.notices:
        typer.echo(f"notice: {line}")
    typer.echo(f"store: {out}")
    typer.echo(f"next:  modis-dist data describe {shlex.quote(str(out))}")


def _print_coverage(coverage: "Coverage") -> None:
    from modis_dist.report.terminal import show, stdout

    tables = [("Rows by class and modality", _class_table(coverage)), ("Modalities", _modality_table(coverage))]
    show(tables, stdout())
    for count, samples in coverage.by_modality_count.items():
        say(f"{samples:,} samples have rows in {count} of {len(coverage.modalities)} modalities")
    for line in coverage.notices:
        say(f"notice: {line}")


def _class_table(coverage: "Coverage") -> "Table":
    """Return a table of the rows per class and modality."""
    from modis_dist.report.tables import add, empty, finished, numbers

    table = empty("class")
    numbers(table, *coverage.modalities)
    modalities = coverage.modalities.values()
    for label in coverage.classes:
        add(table, shown(label), *(f"{m.by_class[label]:,}" if m.by_class[label] else "none" for m in modalities))
    table.add_section()
    add(table, "unlabelled", *(f"{m.unlabelled:,}" for m in modalities))
    add(table, "labelled", *(f"{m.labelled_fraction:.1%}" for m in modalities))
    return finished(table)


def _modality_table(coverage: "Coverage") -> "Table":
    from modis_dist.report.tables import add, empty, finished, numbers

    table = empty("")
    numbers(table, *coverage.modalities)
    modalities = list(coverage.modalities.values())
    add(table, "rows", *(f"{m.rows:,}" for m in modalities))
    add(table, "features", *(f"{m.features:,}" for m in modalities))
    add(table, "groups", *(f"{m.groups:,}" for m in modalities))
    for name in ("minimum", "mean", "maximum"):
        values = [getattr(m, name) for m in modalities]
        add(table, name, *("-" if value is None else f"{value:.4g}" for value in values))
    add(table, "missing values", *(f"{m.missing_fraction:.2%}" for m in modalities))
    add(table, "constant features", *(f"{m.constant_features:,}" for m in modalities))
    for part in ("train", "test", "none"):
        add(table, f"split: {part}", *(f"{m.by_split[part]:,}" for m in modalities))
    return finished(table)
