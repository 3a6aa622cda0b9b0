"""What a study will come to, before anything of it is started: trials, packs, time and disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from modis_dist.execution.run_pack import Pack
    from modis_dist.planning.estimate import Cost, Probed
    from modis_dist.study.plan import Plan

TRIALS_SHOWN = 20


def foreseen(
    planned: "Plan",
    place: Path,
    *,
    folder: Path,
    slots: int,
    refit_slots: int,
    threads: int,
    start_s: float,
    elsewhere: bool = False,
    memory: int | None = None,
    temporary: Path | None = None,
) -> dict[str, Any]:
    """What is left to do in a place and about what it costs, as plain values; results are to go to a folder.

    ``elsewhere``: it will be trained on other nodes; what it takes there is probed on what this machine has.
    ``memory`` is what such a node has, in bytes, where that is known; ``temporary`` the folder for features that are
    kept on a disk, where it is one of this machine.
    """
    import torch

    from modis_dist.execution.run_pack import unfinished_packs
    from modis_dist.planning.estimate import as_rows, costs, disk_bytes, first_round, refits, sizes_of, wall_seconds
    from modis_dist.planning.pack_sizes import compared, footprints

    here = torch.cuda.is_available() and (elsewhere or planned.on_gpu)
    known: Probed = {}

    def cost(packs: "list[Pack]") -> "list[Cost]":
        sizes = sizes_of(planned, packs)
        return costs(
            packs, sizes, planned.selection_of, threads=threads, folder=folder, known=known, elsewhere=elsewhere
        )

    search, again = unfinished_packs(place, planned.packs()), refits(planned)
    first = first_round(planned)  # as large as those whose configurations are not known yet
    found, later, of_round = (cost(packs) for packs in (search, again, first))
    memories = [footprints(planned, packs, limit=memory) for packs in (search, again)]
    kept = [_on_disk(planned, packs, limit=memory) for packs in (search, again, first)]
    listed = listed_trials(planned, place)
    wanted = bool(search) and planned.study.sweep.packing.enabled
    as_there = here or not planned.on_gpu  # a processor's times say nothing about packs on a GPU
    other_sizes = compared(planned, cost, slots=slots, limit=memory) if wanted and as_there else []
    refit_s = wall_seconds(later, slots=refit_slots)
    seconds = wall_seconds(found, slots=slots) + refit_s + planned.to_come * wall_seconds(of_round, slots=slots)
    return {
        "study": planned.study.name,
        "trials": len(listed),
        "done": sum(trial["done"] for trial in listed),
        "list": listed,
        "packs": as_rows(search, found, memories[0], kept[0]),
        "refit_packs": as_rows(again, later, memories[1], kept[1]),
        "pack_sizes": other_sizes,
        "pack_sizes_need_gpu": wanted and not as_there,
        "slots": slots,
        "later_trials": round(planned.to_come * sum(cost.trials for cost in of_round)),
        "seconds": seconds + start_s,
        "refit_seconds": refit_s,
        "pack_seconds": sum(c.seconds for c in found + later) + planned.to_come * sum(c.seconds for c in of_round),
        "bytes": disk_bytes(found + later, slots=slots) + round(planned.to_come * sum(cost.bytes for cost in of_round)),
        "measured_on": torch.cuda.get_device_name() if here else "this machine's processor",
    } | _scratch(kept, slots=(slots, refit_slots, slots), temporary=temporary)


def _scratch(kept: "Sequence[list[int]]", *, slots: "Sequence[int]", temporary: Path | None) -> dict[str, Any]:
    """Of stages with packs that keep so many bytes of features on a disk: the most at once, and whether they fit."""
    from modis_dist.data.store.arrays import insufficient_scratch
    from modis_dist.planning.estimate import at_once

    most = max(at_once(sizes, slots=count) for sizes, count in zip(kept, slots, strict=True))
    problem = insufficient_scratch(most) if most and temporary else None
    if problem and insufficient_scratch(max(max(sizes, default=0) for sizes in kept)) is None:
        problem += "; or train fewer packs at once (sweep.resources), of which one alone has room"
    return {"scratch": most, "scratch_folder": str(temporary) if temporary else None, "scratch_problem": problem}


def _on_disk(planned: "Plan", packs: "Sequence[Pack]", *, limit: int | None) -> list[int]:
    from modis_dist.execution.memory import on_disk

    return [on_disk(pack, planned.store, planned.selection_of, limit=limit) for pack in packs]


def listed_trials(planned: "Plan", place: Path) -> list[dict[str, Any]]:
    """Every trial, and whether it is done."""
    from modis_dist.study.manifest import unique
    from modis_dist.study.plan import is_done

    return [
        {
            "id": trial.id,
            "name": trial.name,
            "condition": trial.condition,
            "params": trial.params,
            "fold": trial.fold,
            "seed": trial.run.seed,
            "done": is_done(place, trial),
        }
        for trial in unique(planned.manifest.trials)
    ]


def print_plan(plain: dict[str, Any]) -> None:
    """The trials, the packs and what they cost, in tables and a line."""
    from modis_dist.cli.display import duration, size
    from modis_dist.report.terminal import show, stdout

    console = stdout()
    show([(f"{plain['study']}: {plain['trials']} trials", _trials(plain))], console)
    if plain["trials"] > TRIALS_SHOWN:
        console.print(f"... and {plain['trials'] - TRIALS_SHOWN} more; --json lists all")
    show([("Packs that are left, then the refit", _packs(plain))], console)
    if plain["pack_sizes"]:
        show([("All trials of the search, in packs of other sizes", _pack_sizes(plain["pack_sizes"]))], console)
        console.print(_advice(plain["pack_sizes"]), soft_wrap=True, markup=False, highlight=False)
    if plain["pack_sizes_need_gpu"]:
        line = "Packs of other sizes were not compared, for this machine has no GPU; a dry run on a node with one does."
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    unknown = (
        f" {plain['later_trials']} trials of later rounds are not known yet; they are counted like those of the first."
        if plain["later_trials"]
        else ""
    )
    console.print(
        f"{plain['done']} of {plain['trials']} trials are done; the rest in {len(plain['packs'])} packs, "
        f"{plain['slots']} at a time, and the refit: about {duration(plain['seconds'])} on {plain['measured_on']}, "
        f"without early stopping or pruning, {size(plain['bytes'])} of disk.{unknown} Nothing was started.",
        soft_wrap=True,
        markup=False,
    )
    if plain["scratch"]:
        console.print(_features_on_disk(plain), soft_wrap=True, markup=False)


def _pack_sizes(rows: "Sequence[dict[str, Any]]") -> "Table":
    """What each takes."""
    from modis_dist.cli.display import duration, size
    from modis_dist.report.tables import add, empty, finished, numbers

    on_gpu = any(row["gpu_memory"] for row in rows)
    table = empty("max_trials")
    numbers(table, "packs", "time", "memory", *["GPU"] * on_gpu)
    for row in rows:
        cells = [str(row["packs"]), duration(row["seconds"]), size(row["memory"])]
        cells += [size(row["gpu_memory"])] * on_gpu
        add(table, f"{row['max_trials']}{', as planned' * row['planned']}", *cells)
    return finished(table)


def _advice(rows: "Sequence[dict[str, Any]]") -> str:
    """Whether another size would be clearly faster."""
    from modis_dist.cli.display import duration
    from modis_dist.planning.pack_sizes import better

    found = better(rows)
    if found is None:
        return "No other size of packs is clearly faster."
    now, best = found
    gain = f"{duration(best['seconds'])} instead of {duration(now['seconds'])}"
    return f"sweep.packing.max_trials: {best['max_trials']} would take {gain}, with the same results but for rounding."


def _features_on_disk(plain: dict[str, Any]) -> str:
    """How much room features take in the temporary folder, and whether it has that."""
    from modis_dist.cli.display import size

    if plain["scratch_problem"]:
        return f"note: {plain['scratch_problem']}"
    most = f"{size(plain['scratch'])} of features are kept on a disk at once"
    if plain["scratch_folder"]:
        return f"{most}, in {plain['scratch_folder']} (TMPDIR), which has room for them."
    one = size(max(row["scratch"] for row in [*plain["packs"], *plain["refit_packs"]]))
    return f"{most}, up to {one} for a pack in the temporary folder of its node; its room cannot be seen from here."


def _trials(plain: dict[str, Any]) -> "Table":
    from modis_dist.report.tables import add, empty, finished, numbers, parameters
    from modis_dist.runtime.text import plain as readable

    table, some_done = empty("trial"), plain["done"] > 0
    parameters(table, "settings")
    if some_done:
        numbers(table, "")
    for trial in plain["list"][:TRIALS_SHOWN]:
        done = ["done" if trial["done"] else ""] if some_done else []
        add(table, trial["id"], readable(trial["name"], limit=200), *done)
    return finished(table)


def _packs(plain: dict[str, Any]) -> "Table":
    """Packs that are alike as far as it is shown share a line."""
    from modis_dist.cli.display import duration, size
    from modis_dist.report.tables import add, empty, finished, numbers

    on_gpu = any(row["gpu_memory"] for row in plain["packs"])
    table = empty("packs")
    kept = any(row["scratch"] for row in [*plain["packs"], *plain["refit_packs"]])
    numbers(table, "trials", "steps", "time", "saving", "memory", *["GPU"] * on_gpu, "disk", *["features"] * kept)
    alike: dict[tuple[str, ...], int] = {}
    for stage, rows in (("search", plain["packs"]), ("refit", plain["refit_packs"])):
        for row in rows:
            cells = [str(row["trials"]), f"{row['steps']:,}", duration(row["seconds"]), duration(row["saving_s"])]
            sizes = ("memory", *["gpu_memory"] * on_gpu, "bytes", *["scratch"] * kept)
            cells += [size(row[key]) for key in sizes]
            alike[stage, *cells] = alike.get((stage, *cells), 0) + 1
    for (stage, *cells), count in alike.items():
        add(table, f"{count}, the refit" if stage == "refit" else str(count), *cells)
    note = "saving: of the time, that of its checkpoints; memory: counted from sizes, not measured"
    return finished(table, f"{note}; features: on a disk while it is trained" if kept else note)
