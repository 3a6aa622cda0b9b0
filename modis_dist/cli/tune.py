"""`modis-dist tune`: the main job, a study from its YAML file to its summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modis_dist.cli.options import Json, RayAddress, Set, print_json
from modis_dist.errors import UserError

if TYPE_CHECKING:
    from modis_dist.config.study import Study
    from modis_dist.launch.mlflow_mirror import BackgroundMirror, NullMirror
    from modis_dist.sweep.plan import Plan
    from modis_dist.sweep.ports import Executor

MLFLOW_PATIENCE_S = 60.0
TRIALS_SHOWN = 20
CONFIGURATIONS_SHOWN = 20


def tune(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the results; runs/NAME by default.", file_okay=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, packs, time and disk; start nothing.")
    ] = False,
    ray: RayAddress = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train every trial of a study, choose, refit, test. Running it again continues where it stopped.

    Example: `modis-dist tune tune_spaces/quickstart.yaml --dry-run`

    On the nodes of a Ray: `modis-dist tune my_study.yaml --ray node1:6379`
    """
    import tempfile

    from modis_dist.config.parse import load_study
    from modis_dist.data.opening import named_store
    from modis_dist.sweep.manifest import expand

    wanted = load_study(study, settings or [])
    expand(wanted, "", source=str(study))  # needs no data
    named_store(wanted.data, source=str(study))  # what is missing is said before ray and torch are loaded
    folder = (out or Path("runs") / wanted.name).absolute()
    with _executor(wanted, ray) as executor:
        if dry_run:
            with tempfile.TemporaryDirectory() as nowhere:
                place = _place(wanted, folder, Path(nowhere))
                _print_plan(_plan(wanted, place, executor, study), executor, place, as_json=as_json)
            return
        summary = _tune(wanted, folder, executor, study)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, folder)
    _fail_if_incomplete(summary, folder)


def _plan(study: "Study", folder: Path, executor: "Executor", source: Path) -> "Plan":
    from modis_dist.sweep.plan import plan

    return plan(study, out=folder, slots=executor.slots, source=str(source))


def _tune(study: "Study", folder: Path, executor: "Executor", source: Path) -> dict[str, Any]:
    from modis_dist.cli.display import errors, sweep_bars
    from modis_dist.sweep.driver import run_study

    planned = _plan(study, folder, executor, source)
    if planned.outdated:
        errors().print(
            f"note: {len(planned.outdated)} trials of an earlier start are not part of this study any more; "
            f"their results stay in {folder / 'trials'}",
            markup=False,
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mirror = _mirror(study, folder)
    try:
        with sweep_bars() as bars:
            return run_study(planned, out=folder, executor=executor, mirror=mirror, display=bars)
    finally:
        with errors().status(f"MLflow gets at most {MLFLOW_PATIENCE_S:.0f} s for what is left"):
            problems = mirror.close(MLFLOW_PATIENCE_S)
        for problem in problems:
            errors().print(f"note: MLflow: {problem}", markup=False)


@contextmanager
def _executor(study: "Study", ray: str | None) -> Iterator["Executor"]:
    resources, workers = study.sweep.resources, study.trainer.workers
    if study.sweep.executor == "local":
        from modis_dist.sweep.local import LocalExecutor

        if ray is not None:
            raise UserError("--ray: the study trains in this process; --set sweep.executor=ray has it use a Ray")
        with LocalExecutor(resources, workers=workers) as executor:
            yield executor
    else:
        from modis_dist.launch.ray_given import ray_at
        from modis_dist.launch.ray_tune import RayExecutor

        with (
            ray_at(ray) as place,
            RayExecutor(resources, place=place, device=study.trainer.device, workers=workers) as executor,
        ):
            yield executor


def _mirror(study: "Study", folder: Path) -> "BackgroundMirror | NullMirror":
    """MLflow as the study asks for it; by default a SQLite file, unless the folder is on a network file system."""
    from modis_dist.cli.display import errors
    from modis_dist.config.parse import digest
    from modis_dist.launch.mlflow_apart import MirrorApart
    from modis_dist.launch.mlflow_mirror import BackgroundMirror, NullMirror
    from modis_dist.launch.mlflow_store import NETWORK, default_uri, file_system

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
    identity = digest([study.name, str(folder)])[:16]  # not the settings: the same study, continued
    return BackgroundMirror(MirrorApart(uri=uri, experiment=experiment, study=identity, folder=folder))


def _place(study: "Study", folder: Path, nowhere: Path) -> Path:
    """Where a dry run plans: the folder where a start has left all that is needed, else where nothing is kept."""
    from modis_dist.data.opening import simulated_store

    simulated = study.data.simulate
    there = folder.exists() if simulated is None else simulated_store(simulated, out=folder).exists()
    return folder if there else nowhere


def _foreseen(planned: "Plan", executor: "Executor", folder: Path) -> dict[str, Any]:
    """What is left to do and about what it costs, as plain values."""
    from modis_dist.sweep.estimate import START_UP_S, as_rows, costs, disk_bytes, first_round, refits, wall_seconds
    from modis_dist.sweep.execute import trial_folder, unfinished
    from modis_dist.sweep.manifest import unique
    from modis_dist.train.outcome import read_result

    trials = unique(planned.manifest.trials)
    listed = [
        {
            "id": trial.id,
            "name": trial.name,
            "condition": trial.condition,
            "params": trial.params,
            "fold": trial.fold,
            "seed": trial.run.seed,
            "done": read_result(trial_folder(folder, trial)) is not None,
        }
        for trial in trials
    ]
    shape_of = {trial.condition: planned.shapes[trial.id] for trial in reversed(planned.manifest.trials)}
    search = unfinished(folder, planned.packs())
    again = refits(planned)
    found = costs(
        search, planned.selection_of, [planned.shapes[p.trials[0].id] for p in search], threads=executor.threads
    )
    later = costs(
        again, planned.selection_of, [shape_of[p.trials[0].condition] for p in again], threads=executor.threads
    )
    first = first_round(planned)  # as large as those whose configurations are not known yet
    of_round = costs(
        first, planned.selection_of, [planned.shapes[p.trials[0].id] for p in first], threads=executor.threads
    )
    seconds = wall_seconds(found, slots=executor.slots) + wall_seconds(later, slots=executor.slots)
    seconds += planned.to_come * wall_seconds(of_round, slots=executor.slots)
    return {
        "study": planned.study.name,
        "trials": len(trials),
        "done": sum(trial["done"] for trial in listed),
        "list": listed,
        "packs": as_rows(search, found),
        "refit_packs": as_rows(again, later),
        "slots": executor.slots,
        "later_trials": round(planned.to_come * sum(cost.trials for cost in of_round)),
        "seconds": seconds + START_UP_S[planned.study.sweep.executor],
        "bytes": disk_bytes(found + later, slots=executor.slots)
        + round(planned.to_come * sum(cost.bytes for cost in of_round)),
    }


def _print_plan(planned: "Plan", executor: "Executor", folder: Path, *, as_json: bool) -> None:
    from modis_dist.report.tables import add, empty, finished, numbers, parameters
    from modis_dist.report.terminal import show, stdout
    from modis_dist.report.text import plain as readable

    plain = _foreseen(planned, executor, folder)
    if as_json:
        print_json(plain)
        return
    console = stdout()
    trials = empty("trial")
    parameters(trials, "settings")
    numbers(trials, "")
    for trial in plain["list"][:TRIALS_SHOWN]:
        add(trials, trial["id"], readable(trial["name"], limit=200), "done" if trial["done"] else "")
    show([(f"{plain['study']}: {plain['trials']} trials", finished(trials))], console)
    if plain["trials"] > TRIALS_SHOWN:
        console.print(f"... and {plain['trials'] - TRIALS_SHOWN} more; --json lists all")
    packs = empty("pack")
    numbers(packs, "trials", "steps", "minutes", "disk MB")
    for row in [*plain["packs"], *(row | {"pack": "refit"} for row in plain["refit_packs"])]:
        cells = (row["trials"], row["steps"], f"{row['seconds'] / 60:.1f}", f"{row['bytes'] / 1e6:,.0f}")
        add(packs, row["pack"], *map(str, cells))
    show([("Packs that are left, then the refit", finished(packs))], console)
    unknown = (
        f" {plain['later_trials']} trials of later rounds are not known yet; they are counted like those of the first."
        if plain["later_trials"]
        else ""
    )
    console.print(
        f"{plain['done']} of {plain['trials']} trials are done; the rest in {len(plain['packs'])} packs, "
        f"{plain['slots']} at a time, and the refit: about {plain['seconds'] / 60:.1f} minutes without early stopping "
        f"or pruning, {plain['bytes'] / 1e6:,.0f} MB.{unknown} Nothing was started.",
        soft_wrap=True,
    )


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from modis_dist.report.study import models, tables
    from modis_dist.report.terminal import show, stdout

    console = stdout()
    show(tables(summary, summary["groups"], metric=summary["metric"], most=CONFIGURATIONS_SHOWN), console)
    for line in models(summary):
        console.print(line, markup=False, soft_wrap=True)
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
