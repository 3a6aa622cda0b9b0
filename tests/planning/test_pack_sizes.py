"""What packs of other sizes would take, as a dry run compares them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modis_dist.cli.dry_run import print_plan
from modis_dist.cli.main import run as command
from modis_dist.config.parse import load_study
from modis_dist.execution.memory import on_gpu
from modis_dist.execution.run_pack import Pack
from modis_dist.planning import pack_sizes
from modis_dist.planning.estimate import Cost
from modis_dist.planning.pack_sizes import better, compared, footprints
from modis_dist.study import packs
from modis_dist.study.plan import Plan, plan
from tests.study.toy_study import write_store, write_study


def planned(folder: Path, **sweep: Any) -> Plan:
    file = write_study(folder / "study.yaml", write_store(folder / "store"), **sweep)
    return plan(load_study(file), out=folder / "out", slots=1, source=str(file))


def ten_seconds_and_one_for_each_trial(found: list[Pack]) -> list[Cost]:
    return [Cost(len(pack.trials), 1, 10.0 + len(pack.trials), 1) for pack in found]


def found(folder: Path, *, slots: int = 1, limit: int | None = None, **sweep: Any) -> dict[int, Any]:
    rows = compared(planned(folder, **sweep), ten_seconds_and_one_for_each_trial, slots=slots, limit=limit)
    return {row["max_trials"]: row for row in rows}


def test_sizes_that_come_to_the_same_packs_are_one(tmp_path: Path) -> None:
    rows = found(tmp_path, replicates=3, folds=1)  # two configurations: six trials
    assert {size: (row["packs"], row["seconds"], row["planned"]) for size, row in rows.items()} == {
        1: (6, 66, False),
        2: (3, 36, False),
        4: (2, 26, False),
        8: (1, 16, True),
    }
    assert rows[1]["memory"] < rows[8]["memory"] and rows[8]["gpu_memory"] == 0


def test_where_every_slot_gets_a_pack_large_ones_are_none(tmp_path: Path) -> None:
    rows = found(tmp_path, slots=3, replicates=3, folds=1)
    assert {size: (row["packs"], row["seconds"]) for size, row in rows.items()} == {1: (6, 22), 8: (3, 12)}


def test_the_size_that_was_asked_for_is_among_them(tmp_path: Path) -> None:
    rows = found(tmp_path, replicates=3, folds=1, packing={"max_trials": 3})
    assert [size for size, row in rows.items() if row["planned"]] == [3] and sorted(rows) == [1, 2, 3, 8]


def test_sizes_without_room_are_left_out(tmp_path: Path) -> None:
    every = found(tmp_path / "a", replicates=3, folds=1)
    limit = every[4]["memory"]
    assert sorted(found(tmp_path / "b", replicates=3, folds=1, packing={"max_trials": 1}, limit=limit)) == [1, 2, 4]
    assert sorted(found(tmp_path / "c", replicates=3, folds=1, limit=limit)) == [1, 2, 4, 8], "what is planned is told"


def test_the_planned_row_is_the_plan_where_conditions_have_networks_of_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = {"small": {}, "large": {"model.latent": 64}}
    here = planned(tmp_path, grid={}, folds=1, replicates=6, conditions=conditions)
    sizes = sorted({pack_sizes.model_bytes(shape, replicates=1) for shape in here.shapes.values()})
    monkeypatch.setattr(packs, "MOST_BYTES", 3 * sizes[1])
    here = replace(here, manifest=replace(here.manifest, packs=()))
    rows = {row["max_trials"]: row for row in compared(here, ten_seconds_and_one_for_each_trial, slots=1, limit=None)}
    (now,) = (size for size, row in rows.items() if row["planned"])
    assert now == min(8, 3 * sizes[1] // sizes[0]) > 3
    assert rows[now]["packs"] == 1 + 2, "six small networks in one, six large ones in two"


def test_of_networks_too_large_to_be_probed_as_a_stack_no_sizes_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_sizes, "PROBE_BYTES", 10)
    assert found(tmp_path) == {}


def test_packs_trained_on_a_gpu_are_counted_as_such(tmp_path: Path) -> None:
    here = planned(tmp_path)
    there = replace(here, on_gpu=True)
    shape = next(iter(here.shapes.values()))
    assert footprints(there, here.packs(), limit=None) == [on_gpu(p, here.store, shape) for p in here.packs()]
    assert footprints(here, here.packs(), limit=None)[0].gpu == 0 < footprints(there, here.packs(), limit=None)[0].gpu


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 80, 8: 40, 16: 20}, 16),
        ({1: 80, 8: 40, 16: 20.5, 32: 20}, 16),  # about as fast with half the memory
        ({1: 10, 8: 40}, 1),
        ({1: 80, 8: 40, 16: 33}, None),  # not told from noise
        ({1: 80, 8: 40}, None),
    ],
)
def test_another_size_is_advised_where_it_is_clearly_faster(seconds: dict[int, float], best: int | None) -> None:
    rows = [{"max_trials": size, "seconds": held, "planned": size == 8} for size, held in seconds.items()]
    advised = better(rows)
    assert (advised and [row["max_trials"] for row in advised]) == (best and [8, best])


def test_a_dry_run_has_them_and_says_which_is_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file, out = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store")), tmp_path / "out"
    words = ["tune", str(file), "--out", str(out), "--set", "sweep.packing.max_trials=1", "--dry-run"]
    assert command([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    sizes = {row["max_trials"]: row for row in plain["pack_sizes"]}
    assert sorted(sizes) == [1, 2, 4] and sizes[1]["planned"] and not sizes[4]["planned"]
    assert sizes[1]["seconds"] == pytest.approx(sum(pack["seconds"] for pack in plain["packs"])), "one probe for both"
    for row, seconds in zip(plain["pack_sizes"], (90.0, 40.0, 60.0), strict=True):
        row["seconds"] = seconds
    print_plan(plain)
    said = capsys.readouterr().out
    assert "1, as planned" in said and "sweep.packing.max_trials: 2 would take 40 s instead of 90 s" in said
    assert command([*words, "--set", "sweep.packing.enabled=false", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pack_sizes"] == []
