"""`modis-dist verify-resume`: whether a killed run ends with the bits of an undisturbed one."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, Set, print_json
from modis_dist.runtime.errors import DataError, Interrupted, RunFailed

if TYPE_CHECKING:
    from modis_dist.execution.verify_resume import Verdict

SHOWN = 5  # differences


def verify_resume(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run.yaml, or a folder that holds one.", show_default=False, exists=True),
    ],
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs to train.")] = 2,
    kills: Annotated[int, typer.Option("--kills", min=1, help="Times to be killed.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the steps to be killed at.")] = 0,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train a run for a few epochs, undisturbed and killed again and again, and compare every bit of the two.

    On your data, device, precision and number of workers, in a temporary folder; the run's own folder is only read.
    Exit code 0 where all is equal, 3 where something differs.

    Example: `modis-dist verify-resume runs/mine/model --kills 5`
    """
    from modis_dist.cli.display import run_bar
    from modis_dist.config.parse import load_run
    from modis_dist.data.store.open_store import named_store

    file = run / "run.yaml" if run.is_dir() else run
    if not file.exists():
        raise DataError(f"{run}: holds no run.yaml; name a run.yaml, or the folder of a trial or a trained run")
    wanted = load_run(file, settings or [])
    named_store(wanted.data, source=str(file))  # what is missing is said before torch is loaded

    from modis_dist.execution.verify_resume import verify
    from modis_dist.runtime.signals import on_signal

    with on_signal(_leave), TemporaryDirectory(prefix="verify-") as folder, run_bar(2 * epochs) as bar:
        verdict = verify(
            wanted, source=str(file), epochs=epochs, kills=kills, seed=seed, folder=Path(folder), reporter=bar
        )
    if as_json:
        print_json(asdict(verdict) | {"equal": verdict.equal})
    else:
        _print(verdict)
    if not verdict.equal:
        raise RunFailed(f"{file}: a killed run differs from an undisturbed one, first in {verdict.differences[0]}")


def _leave(reason: str) -> None:
    """Out of whatever is being done: nothing of it is worth saving."""
    raise Interrupted(f"{reason}; nothing is known yet, and nothing is left behind; the same command begins anew")


def _print(verdict: "Verdict") -> None:
    from modis_dist.report.tables import add, empty, finished
    from modis_dist.report.terminal import show, stdout

    table = empty("killed and continued, against undisturbed")
    table.add_column("")
    add(table, "epochs, optimiser steps", f"{verdict.epochs}, {verdict.steps:,}")
    add(table, "killed by SIGKILL after step", ", ".join(map(str, verdict.kills)))
    add(table, "tensors compared", f"{verdict.tensors:,}")
    add(table, "verdict", "equal to the bit" if verdict.equal else f"{len(verdict.differences):,} differences")
    for what in verdict.differences[:SHOWN]:
        add(table, "differs", what)
    show([("", finished(table))], stdout())
