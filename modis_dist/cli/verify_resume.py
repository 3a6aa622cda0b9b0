"""`modis-dist verify-resume`: check that a killed and resumed run is bit-identical to an uninterrupted one."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, Set, print_json
from modis_dist.runtime.errors import DataError, Interrupted, RunFailed

if TYPE_CHECKING:
    from modis_dist.config.run import Run
    from modis_dist.execution.verify_resume import VerificationResult

DIFFERENCES_SHOWN = 5


def verify_resume(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run.yaml, or a folder that contains one.", show_default=False, exists=True
        ),
    ],
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs to train.")] = 2,
    kills: Annotated[int, typer.Option("--kills", min=1, help="Number of kills.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Random seed that selects the steps to kill at.")] = 0,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Check that a run that is killed and resumed gives bit-identical results.

    Trains the run twice for a few epochs in a temporary folder, with its data, device, precision and number of workers:
    once uninterrupted, once killed and resumed. Exits with 0 if the results are bit-identical, with 3 if not.

    Example: `modis-dist verify-resume runs/mine/model --kills 5`
    """
    file, parsed = _load(run, settings or [])

    from modis_dist.cli.display import RunBar, progress_bars
    from modis_dist.execution.verify_resume import verify
    from modis_dist.runtime.signals import on_signal

    with on_signal(_interrupt), TemporaryDirectory(prefix="verify-") as folder, progress_bars() as bars:
        reporter = RunBar(bars, 2 * epochs)
        result = verify(
            parsed, source=str(file), epochs=epochs, kills=kills, seed=seed, folder=Path(folder), reporter=reporter
        )
    if as_json:
        print_json(asdict(result) | {"equal": result.equal})
    else:
        _print(result)
    if not result.equal:
        raise RunFailed(f"{file}: the killed run differs from the uninterrupted one, first in {result.differences[0]}")


def _load(path: Path, settings: list[str]) -> "tuple[Path, Run]":
    """Return the run.yaml at a path and its run. Raises for a missing store before torch is loaded."""
    from modis_dist.config.parse import load_run
    from modis_dist.data.open_store import named_store

    file = path / "run.yaml" if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{path}: no run.yaml in this folder; give a run.yaml, or the output folder of a trial or run")
    run = load_run(file, settings)
    named_store(run.data, source=str(file))
    return file, run


def _interrupt(reason: str) -> None:
    raise Interrupted(f"{reason}; temporary files were removed; rerun the same command")


def _print(result: "VerificationResult") -> None:
    from modis_dist.report.tables import add, empty, finished
    from modis_dist.report.terminal import show, stdout

    table = empty("killed and resumed vs. uninterrupted run")
    table.add_column("")
    add(table, "epochs, optimiser steps", f"{result.epochs}, {result.steps:,}")
    add(table, "killed by SIGKILL after step", ", ".join(map(str, result.kills)))
    add(table, "tensors compared", f"{result.tensors:,}")
    add(table, "result", "bit-identical" if result.equal else f"{len(result.differences):,} differences")
    for difference in result.differences[:DIFFERENCES_SHOWN]:
        add(table, "differs", difference)
    show([("", finished(table))], stdout())
