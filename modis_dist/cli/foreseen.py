"""What a study will come to, before anything of it is started: trials, packs, time and disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modis_dist.sweep.plan import Plan

TRIALS_SHOWN = 20


def foreseen(
    planned: "Plan", folder: Path, *, slots: int, threads: int, start_s: float, elsewhere: bool = False
) -> dict[str, Any]:
    """What is left to do and about what it costs, as plain values."""
    from functools import partial

    from modis_dist.sweep.estimate import as_rows, costs, disk_bytes, first_round, refits, wall_seconds
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
    cost = partial(costs, selection_of=planned.selection_of, threads=threads, elsewhere=elsewhere)
    found = cost(search, shapes=[planned.shapes[pack.trials[0].id] for pack in search])
    later = cost(again, shapes=[shape_of[pack.trials[0].condition] for pack in again])
    first = first_round(planned)  # as large as those whose configurations are not known yet
    of_round = cost(first, shapes=[planned.shapes[pack.trials[0].id] for pack in first])
    seconds = wall_seconds(found, slots=slots) + wall_seconds(later, slots=slots)
    seconds += planned.to_come * wall_seconds(of_round, slots=slots)
    return {
        "study": planned.study.name,
        "trials": len(trials),
        "done": sum(trial["done"] for trial in listed),
        "list": listed,
        "packs": as_rows(search, found),
        "refit_packs": as_rows(again, later),
        "slots": slots,
        "later_trials": round(planned.to_come * sum(cost.trials for cost in of_round)),
        "seconds": seconds + start_s,
        "pack_seconds": sum(c.seconds for c in found + later) + planned.to_come * sum(c.seconds for c in of_round),
        "bytes": disk_bytes(found + later, slots=slots) + round(planned.to_come * sum(cost.bytes for cost in of_round)),
    }


def print_plan(plain: dict[str, Any]) -> None:
    """The trials, the packs and what they cost, in tables and a line."""
    from modis_dist.cli.display import duration
    from modis_dist.report.tables import add, empty, finished, numbers, parameters
    from modis_dist.report.terminal import show, stdout
    from modis_dist.report.text import plain as readable

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
    numbers(packs, "trials", "steps", "time", "disk MB")
    for row in [*plain["packs"], *(row | {"pack": "refit"} for row in plain["refit_packs"])]:
        cells = (row["trials"], row["steps"], duration(row["seconds"]), f"{row['bytes'] / 1e6:,.0f}")
        add(packs, row["pack"], *map(str, cells))
    show([("Packs that are left, then the refit", finished(packs))], console)
    unknown = (
        f" {plain['later_trials']} trials of later rounds are not known yet; they are counted like those of the first."
        if plain["later_trials"]
        else ""
    )
    console.print(
        f"{plain['done']} of {plain['trials']} trials are done; the rest in {len(plain['packs'])} packs, "
        f"{plain['slots']} at a time, and the refit: about {duration(plain['seconds'])} without early stopping or "
        f"pruning, {plain['bytes'] / 1e6:,.0f} MB.{unknown} Nothing was started.",
        soft_wrap=True,
    )
