"""Epochs until a schedule reaches another one's final metric, from synthetic curves."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from modis_dist.runtime.files import write_json
from modis_dist.train.journal import JournalWriter
from tools.bench.quality import Curve, compared, curves, journal_seconds


def curve(*values: float, s: float = 1.0) -> Curve:
    return Curve(values, tuple(s * epoch for epoch in range(1, len(values) + 1)))


def test_a_preset_is_compared_with_the_final_metric_of_the_first_minus_half_a_point() -> None:
    slow = [curve(0.2, 0.5, 0.8, 0.894, 0.896, 0.9, 0.9, 0.9, 0.9, 0.9), curve(*[0.5] * 5, *[0.7] * 5)]
    fast = [curve(0.6, 0.9, 0.95, s=2.0), curve(0.6, 0.7, 0.7, s=2.0)]
    first, second = compared({"published": slow, "fast": fast})
    assert (first["preset"], first["epochs"], first["reached"]) == ("published", 5.5, 2)  # epochs 5 and 6
    assert first["end"] == pytest.approx(0.8) and first["of_all"] == pytest.approx(10 / 5.5) and first["ratio"] == 1
    assert (second["epochs"], second["ours_ms"], second["reached"]) == (2, 4000, 2)
    assert (second["of_all"], second["ratio"]) == (2.5, 5.5 / 4)


def test_a_single_good_epoch_is_not_enough() -> None:
    wild = curve(0.9, *[0.1] * 5, *[0.9] * 5)
    assert wild.reaches(0.9) == 7
    assert curve(0.5, 0.95, 0.85, 0.9, 0.9, 0.9).reaches(0.9) == 2


def test_a_schedule_that_most_replicates_fail_to_reach_the_target_with_has_no_time() -> None:
    good = [curve(0.9, 0.9)] * 3
    _, never = compared({"published": good, "fast": [curve(0.9, 0.9), *[curve(0.5, 0.894)] * 2]})
    assert (never["reached"], never["epochs"], never["ours_ms"], never["ratio"]) == (1, None, None, None)


def test_curves_and_their_seconds_are_read_from_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = tmp_path / "packs" / "p"
    pack.mkdir(parents=True)
    clock = iter([1000, 3500, 4500])
    monkeypatch.setattr("modis_dist.train.journal.time", SimpleNamespace(time_ns=lambda: next(clock) * 1_000_000))
    with JournalWriter(pack / "journal.jsonl") as journal:
        journal.event("t", kind="start", values={"epoch": 0})
        for epoch in (1, 2):
            journal.metrics("t", step=epoch, values={"val/balanced_accuracy": epoch / 10})
    write_json(tmp_path / "manifest.json", {"trials": [{"id": "t", "condition": "fast"}]})
    (tmp_path / "trials" / "t").mkdir(parents=True)
    rows = [{"epoch": epoch, "val/balanced_accuracy": epoch / 10} for epoch in (1.0, 2.0)]
    write_json(tmp_path / "trials" / "t" / "history.json", rows)
    assert journal_seconds(tmp_path) == {"t": {1: 2.5, 2: 3.5}}
    assert curves(tmp_path) == {"fast": [Curve((0.1, 0.2), (2.5, 3.5))]}
