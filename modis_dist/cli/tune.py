"""`modis-dist tune`: the main job, a study from its YAML file to its summary."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modis_dist.cli.options import Json, Set, print_json

if TYPE_CHECKING:
    from modis_dist.config.study import Study
    from modis_dist.launch.mlflow_mirror import BackgroundMirror, NullMirror
    from modis_dist.sweep.driver import Executor, Plan

MLFLOW_PATIENCE_S = 60.0


def tune(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the results; runs/NAME by default.", file_okay=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, packs, time and disk; start nothing.")
    ] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train every trial of a study, choose, refit, test. Running it again continues where it stopped.

    Example: `modis-dist tune tune_spaces/quickstart.yaml --dry-run`
    """
    import tempfile

    from modis_dist.config.parse import load_study
    from modis_dist.data.opening import named_store

    wanted = load_study(study, settings or [])
    named_store(wanted.data, source=str(study))  # what is missing is said before ray and torch are loaded
    folder = (out or Path("runs") / wanted.name).absolute()
    with _executor(wanted) as executor:
        if dry_run:
            with tempfile.TemporaryDirectory() as nowhere:
                place = folder if folder.exists() else Path(nowhere)
                _print_plan(_plan(wanted, place, executor, study), executor, as_json=as_json)
            return
        summary = _tune(wanted, folder, executor, study)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, folder)
    _fail_if_incomplete(summary, folder)


def _plan(study: "Study", folder: Path, executor: "Executor", source: Path) -> "Plan":
    from modis_dist.sweep.driver import plan

    return plan(study, out=folder, slots=executor.slots, source=str(source))


def _tune(study: "Study", folder: Path, executor: "Executor", source: Path) -> dict[str, Any]:
    from modis_dist.cli.display import errors, sweep_bars
    from modis_dist.sweep.driver import run_study

    planned = _plan(study, folder, executor, source)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mirror = _mirror(study, folder)
    try:
        with sweep_bars() as bars:
            return run_study(planned, out=folder, executor=executor, mirror=mirror, display=bars)
    finally:
        for problem in mirror.close(MLFLOW_PATIENCE_S):
            errors().print(f"note: MLflow: {problem}; the same command sends it again", markup=False)


def _executor(study: "Study") -> "Executor":
    if study.sweep.executor == "local":
        from modis_dist.sweep.local import LocalExecutor

        return LocalExecutor()
    from modis_dist.launch.ray_tune import RayExecutor

    return RayExecutor(study.sweep.resources, device=study.trainer.device)


def _mirror(study: "Study", folder: Path) -> "BackgroundMirror | NullMirror":
    """MLflow as the study asks for it; by default a SQLite file, unless the folder is on a network file system."""
    from modis_dist.cli.display import errors
    from modis_dist.config.parse import digest, to_tree
    from modis_dist.launch.mlflow_mirror import BackgroundMirror, NullMirror
    from modis_dist.launch.mlflow_store import NETWORK, default_uri, file_system
    from modis_dist.launch.mlflow_study import Mirror

    wanted = study.sweep.mlflow
    if wanted.uri is None and (kind := file_system(folder)) in NETWORK:
        errors().print(
            f"note: {folder} is on a network file system ({kind}), where MLflow's SQLite would be damaged: no MLflow. "
            "Every curve is kept in packs/*/journal.jsonl; the same command with "
            "--set sweep.mlflow.uri=sqlite:////LOCAL/mlflow.db fills one later.",
            markup=False,
        )
        return NullMirror()
    uri, experiment = wanted.uri or default_uri(folder), wanted.experiment or study.name
    identity = digest([to_tree(study), str(folder)])[:16]
    return BackgroundMirror(Mirror(uri=uri, experiment=experiment, study=identity, folder=folder))


def _print_plan(planned: "Plan", executor: "Executor", *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from modis_dist.sweep.estimate import as_rows, costs, wall_seconds

    packs = planned.packs()
    shapes = [planned.shapes[pack.trials[0].id] for pack in packs]
    found = costs(packs, planned.selection, shapes, threads=executor.threads)
    seconds, size = wall_seconds(found, slots=executor.slots), sum(cost.bytes for cost in found)
    plain = {
        "study": planned.study.name,
        "trials": len(planned.manifest.trials),
        "packs": as_rows(packs, found),
        "slots": executor.slots,
        "seconds": seconds,
        "bytes": size,
    }
    if as_json:
        print_json(plain)
        return
    table = Table("pack", "trials", "steps", "minutes", "disk MB", title=f"{planned.study.name}: the search")
    for row in as_rows(packs, found):
        numbers = (row["trials"], row["steps"], f"{row['seconds'] / 60:.1f}", f"{row['bytes'] / 1e6:,.0f}")
        table.add_row(row["pack"], *map(str, numbers))
    for column in table.columns[1:]:
        column.justify = "right"
    console = Console()
    console.print(table)
    console.print(
        f"{plain['trials']} trials in {len(packs)} packs, {executor.slots} at a time: at most about "
        f"{seconds / 60:.1f} minutes of training, {size / 1e6:,.0f} MB; then the refit of what is chosen. "
        "Nothing was started."
    )


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from modis_dist.report.study import tables
    from modis_dist.report.terminal import show, stdout

    console = stdout()
    show(tables(summary, summary["groups"], metric=summary["metric"]), console)
    console.print(
        f"Report, figures and the model are in {folder}; `modis-dist ui {folder}` shows the curves.",
        markup=False,
        soft_wrap=True,
    )


def _fail_if_incomplete(summary: dict[str, Any], folder: Path) -> None:
    from modis_dist.errors import SweepIncomplete, shown

    failures = summary["failures"]
    if failures:
        reasons = "; ".join(shown(reason) for reason in sorted(set(failures.values()))[:3])
        raise SweepIncomplete(
            f"{len(failures)} trials failed ({reasons}); the others are finished and kept in {folder}"
        )
