"""`modis-dist train` and `modis-dist evaluate`: one run by itself."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, ModelFolder, RayAddress, Set, StoreFolder, print_json
from modis_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from modis_dist.cli.display import RunBar
    from modis_dist.config.run import Run
    from modis_dist.evaluate.baseline import Baseline
    from modis_dist.evaluate.results import Evaluation, Result, StoreEvaluation


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Settings of the run.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the results.", show_default=False, file_okay=False)
    ],
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Processes that share it; sets trainer.workers.")
    ] = None,
    ray: RayAddress = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train one run, or continue it where it stopped. The run.yaml of a finished run runs again.

    Example: `modis-dist train run.yaml --out runs/one --set optim.lr=1e-3`

    On the nodes of a Ray: `modis-dist train run.yaml --out runs/one --workers 4 --ray node1:6379`
    """
    from modis_dist.cli.display import run_bar
    from modis_dist.config.parse import load_run
    from modis_dist.data.store.open_store import named_store

    shared = [] if workers is None else [f"trainer.workers={workers}"]
    wanted = load_run(run, [*(settings or []), *shared])
    if ray is not None and wanted.trainer.workers == 1:
        raise UserError("--ray: one worker trains in this process; say how many with --workers")
    named_store(wanted.data, source=str(run))  # what is missing is said before torch is loaded

    with run_bar(wanted.optim.epochs) as bar:
        result = _trained(wanted, out.absolute(), str(run), bar, ray)
    if as_json:
        print_json(result)
        return
    if result["evaluation"] is None:
        typer.echo(f"trained {result['epochs']} epochs (no validation rows); model in {out}")
        store = wanted.data.store or next(out.glob("store-*"), "STORE")
        typer.echo(f"score its test rows with: modis-dist evaluate {quote(str(out))} {quote(str(store))}")
        return
    typer.echo(f"best epoch {result['best_epoch']} of {result['epochs']}; model and figures in {out}")
    _print_tables(result["evaluation"], result["baseline"], "validation")


def _trained(run: "Run", out: Path, source: str, bar: "RunBar", ray: str | None) -> "Result":
    if run.trainer.workers > 1:
        from modis_dist.integrations.ray.existing_cluster import ray_at
        from modis_dist.integrations.ray.train import train_run_on_ranks

        with ray_at(ray) as place:
            return train_run_on_ranks(run, out=out, source=source, reporter=bar, backend=place)
    from modis_dist.execution.single import train_run
    from modis_dist.runtime.signals import Flag, on_signal

    flag = Flag()
    with on_signal(flag.set):
        result = train_run(run, out=out, source=source, reporter=bar, stop=flag)
    assert result is not None, "there is one rank"
    return result


def evaluate(directory: ModelFolder, store: StoreFolder, as_json: Json = False) -> None:
    """Judge a trained model on a store: its test rows if it is the store it was trained with, otherwise all rows.

    Example: `modis-dist evaluate runs/quickstart mystore`
    """
    from modis_dist.execution.single import evaluate_folder

    result = evaluate_folder(directory, store)
    if as_json:
        print_json(result)
        return
    if result["left_out"]:
        typer.echo(f"note: {result['left_out']} rows of classes that the model does not know are left out", err=True)
    _print_tables(result["evaluation"], result["baseline"], _say_training_rows(result))


def _say_training_rows(result: "StoreEvaluation") -> str:
    """Notes on rows the model may know already; returns what the judged rows are called."""
    left_out = result["training_rows_left_out"]
    if result["rows"] != "all" or left_out == 0:
        return result["rows"]
    if left_out is None:
        typer.echo(
            "WARNING: the store that the model was trained with is not at hand, so rows it was trained on may be "
            "among those judged here; the metrics may be too good",
            err=True,
        )
        return "all"
    typer.echo(f"note: {left_out} rows with the sample or group id of a training row are left out", err=True)
    return "other"


def _print_tables(evaluation: "Evaluation", baseline: "Baseline | None", rows: str) -> None:
    from modis_dist.report.tables import class_table, evaluation_table, probe_line, translation_table
    from modis_dist.report.terminal import show, stdout

    console = stdout()
    titled = [
        (f"On {rows} rows", evaluation_table(evaluation["classification"], baseline)),
        ("By class", class_table(evaluation["classification"])),
        ("Reconstruction and translation", translation_table({"": evaluation["translation"]})),
    ]
    show(titled, console)
    if evaluation["probe"] is not None:
        console.print(probe_line(evaluation["probe"]), soft_wrap=True)
