"""Successive halving on histories worked out by hand, and stored decisions."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from modis_dist.runtime.errors import DataError
from modis_dist.study.search.decisions import FILE, record_decision, stored_decision
from modis_dist.study.search.halving import best_up_to, verdict_message, verdicts

NMI = "nmi"


def history(*values: float | None) -> list[dict[str, float | None]]:
    return [{"epoch": float(n), "val/nmi": value} for n, value in enumerate(values, start=1)]


def test_the_value_at_a_rung_is_the_best_of_the_epochs_up_to_it() -> None:
    rows = history(0.2, None, 0.6, 0.5, 0.9)
    assert [best_up_to(rows, epoch, metric=NMI) for epoch in range(6)] == [None, 0.2, 0.2, 0.6, 0.6, 0.9]
    errors = [
        {"epoch": 1.0, "val/reconstruction_mse": 3.0},
        {"epoch": 2.0, "val/reconstruction_mse": 2.0},
        {"epoch": 3.0},
    ]
    assert best_up_to(errors, 3, metric="reconstruction_mse") == 2.0


GROUPS = [  # means at the rung, in this order: .50 .70 undefined .65 .10 .70 .40
    [0.4, 0.6],
    [0.8, 0.6],
    [0.9, None],  # a trial failed
    [0.65, 0.65],
    [0.1, 0.1],
    [0.7, 0.7],
    [0.4, 0.4],
]


def test_the_best_third_is_promoted_ties_by_order_and_groups_with_a_failed_trial_rank_last() -> None:
    rows = verdicts(GROUPS, epoch=20, factor=3, metric=NMI)
    assert [row["rank"] for row in rows] == [4, 1, 7, 3, 6, 2, 5]
    assert [row["promoted"] for row in rows] == [False, True, False, False, False, True, False], "7 // 3 = 2"
    assert rows[0] == {
        "epoch": 20,
        "mean": 0.5,
        "sd": pytest.approx(0.02**0.5),
        "n": 2,
        "rank": 4,
        "of": 7,
        "promoted": False,
    }
    assert rows[2]["mean"] == 0.9 and rows[2]["n"] == 1


def test_a_lower_error_is_better_and_at_least_one_group_is_promoted() -> None:
    rows = verdicts([[3.0], [1.0], [2.0]], epoch=1, factor=4, metric="reconstruction_mse")
    assert [row["promoted"] for row in rows] == [False, True, False]
    nothing = verdicts([[None], [None]], epoch=1, factor=2, metric=NMI)
    assert [row["promoted"] for row in nothing] == [True, False] and nothing[0]["mean"] is None


@pytest.mark.parametrize(("groups", "factor", "sizes"), [(27, 3, [9, 3, 1, 1]), (10, 3, [3, 1, 1]), (9, 2, [4, 2, 1])])
def test_the_number_of_groups_falls_by_the_factor_at_every_rung(groups: int, factor: int, sizes: list[int]) -> None:
    living = [[float(n)] for n in range(groups)]
    for count in sizes:
        rows = verdicts(living, epoch=1, factor=factor, metric=NMI)
        living = [group for group, row in zip(living, rows, strict=True) if row["promoted"]]
        assert len(living) == count and living[-1] == [groups - 1.0]


def test_the_reason_names_epoch_value_and_rank() -> None:
    rows = verdicts(GROUPS, epoch=20, factor=3, metric=NMI)
    assert re.findall(r"[\d.]+", verdict_message(rows[0])) == ["20", "0.500", "4", "7"]
    _, undefined = verdicts([[1.0], [None]], epoch=3, factor=2, metric=NMI)
    assert re.findall(r"[\d.]+", verdict_message(undefined)) == ["3", "2", "2"]


# --- decisions ----------------------------------------------------------------------------------------------


def test_a_decision_is_looked_up_by_its_subject(tmp_path: Path) -> None:
    first: dict[str, Any] = {"rung": 20, "groups": "a"}
    assert stored_decision(tmp_path, first) is None
    assert record_decision(tmp_path, first, {"verdicts": [1 / 3]}) == {"verdicts": [1 / 3]}
    record_decision(tmp_path, {"rung": 60, "groups": "a"}, {"verdicts": []})
    assert stored_decision(tmp_path, {"groups": "a", "rung": 20}) == {"verdicts": [1 / 3]}
    assert stored_decision(tmp_path, {"rung": 20, "groups": "b"}) is None


@pytest.mark.parametrize("damage", ["checksum", "text", "version"])
def test_a_damaged_file_of_decisions_is_refused(tmp_path: Path, damage: str) -> None:
    record_decision(tmp_path, {"rung": 20}, {"promoted": [True]})
    content = json.loads((tmp_path / FILE).read_text())
    if damage == "checksum":
        content["decisions"][0]["decision"]["promoted"] = [False]
    if damage == "version":
        content["version"] = 99
    (tmp_path / FILE).write_text("{" if damage == "text" else json.dumps(content))
    with pytest.raises(DataError, match=FILE):
        stored_decision(tmp_path, {"rung": 20})
