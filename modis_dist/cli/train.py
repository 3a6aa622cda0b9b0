"""`modis-dist train` and `modis-dist evaluate`: a single run without a study."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, OutputFolder, RayAddress, Set, StoreFolder, print_json, say
from modis_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from modis_dist.cli.display import RunBar
    from modis_dist.config.run import Run
    from modis_dist.evaluate.baseline import Baseline
    from modis_dist.evaluate.results import Evaluation, Result, StoreEvaluation


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run configuration.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Output folder.", show_default=False, file_okay=False)
    ],
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Number of worker processes (trainer.workers)."),
    ] = None,
    ray: RayAddress = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train a single run without a study, or resume it. Accepts the run.yaml of a finished run.

    Example: `modis-dist train run.yaml --out runs/one --set optim.lr=1e-3`

    On a Ray cluster: `modis-dist train run.yaml --out runs/one --workers 4 --ray node1:6379`
    """
    from modis_dist.cli.display import RunBar, progress_bars
    from modis_dist.config.parse import load_run
    from modis_dist.data.open_store import named_store

    by_option = [] if workers is None else [f"trainer.workers={workers}"]
    parsed = load_run(run, [*(settings or []), *by_option])
    if ray is not None and parsed.trainer.workers == 1:
        raise UserError("--ray: requires several workers; set --workers to 2 or more")
    named_store(parsed.data, source=str(run))  # raises for a missing store before torch is loaded

    with progress_bars() as bars:
        result = _train(parsed, out.absolute(), str(run), RunBar(bars, parsed.optim.epochs), ray)
    print_json(result) if as_json else _print(result, out, store=parsed.data.store)


def _print(result: "Result", out: Path, *, store: str | None) -> None:
    if result["evaluation"] is None:
        typer.echo(f"trained {result['epochs']} epochs (no validation rows); the model is in {out}")
        store = store or str(next(out.glob("store-*"), "STORE"))
        typer.echo(f"evaluate it on its test rows with: modis-dist evaluate {quote(str(out))} {quote(store)}")
        return
    typer.echo(f"best epoch {result['best_epoch']} of {result['epochs']}; model and figures are in {out}")
    _print_tables(result["evaluation"], result["baseline"], "validation")


def _train(run: "Run", out: Path, source: str, bar: "RunBar", ray: str | None) -> "Result":
    if run.trainer.workers > 1:
        from modis_dist.integrations.ray.existing_cluster import ray_at
        from modis_dist.integrations.ray.train import train_run_on_ranks

        with ray_at(ray) as backend:
            return train_run_on_ranks(run, out=out, source=source, reporter=bar, backend=backend)
    from modis_dist.execution.single import train_run
    from modis_dist.runtime.signals import Flag, on_signal

    flag = Flag()
    with on_signal(flag.set):
        result = train_run(run, out=out, source=source, reporter=bar, stop=flag)
    assert result is not None, "a single process is rank 0"
    return result


def evaluate(directory: OutputFolder, store: StoreFolder, as_json: Json = False) -> None:
    """Evaluate a trained model on a store. On the store that it was trained on, only the test rows are used.

    Example: `modis-dist evaluate runs/quickstart mystore`
    """
    from modis_dist.evaluate.evaluate_folder import evaluate_folder

    result = evaluate_folder(directory, store)
    if as_json:
        print_json(result)
        return
    if result["left_out"]:
        typer.echo(f"note: {result['left_out']} rows of classes unknown to the model are excluded", err=True)
    _print_tables(result["evaluation"], result["baseline"], _note_training_rows(result))


def _note_training_rows(result: "StoreEvaluation") -> str:
    """Print a note on rows that the model may have been trained on; return the name of the evaluated rows."""
    left_out = result["training_rows_left_out"]
    if result["rows"] != "all" or left_out == 0:
        return result["rows"]
    if left_out is None:
        typer.echo(
            "warning: the model's training store was not found, so training rows may be among those evaluated; "
            "the metrics may be too high",
            err=True,
        )
        return "all"
    typer.echo(f"note: {left_out} rows with the sample or group id of a training row are excluded", err=True)
    return "other"


def _print_tables(evaluation: "Evaluation", baseline: "Baseline | None", rows: str) -> None:
    from modis_dist.report.tables import class_table, evaluation_table, probe_line, translation_table
    from modis_dist.report.terminal import show, stdout

    titled = [
        (f"Metrics on {rows} rows", evaluation_table(evaluation["classification"], baseline)),
        ("By class", class_table(evaluation["classification"])),
        ("Reconstruction and translation", translation_table({"": evaluation["translation"]})),
    ]
    show(titled, stdout())
    if evaluation["probe"] is not None:
        say(probe_line(evaluation["probe"]))
