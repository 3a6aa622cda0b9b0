"""Epochs and seconds until a training reaches the final metric of the published preset, for each condition of a study.

python -m tools.bench quality study.yaml
python -m tools.bench quality study.yaml --out runs/quality     # kept; a finished study is only read

The study has replicates and conditions that differ in `optim.preset`, `published` first. The target is the mean
validation metric of the first condition's last five epochs minus half a point of balanced accuracy. `epochs` and
`ours_ms` are the first epoch and time at which the mean of five epochs reaches it (medians; replicates that never reach
it rank last; `reached` counts those that do). `baseline_ms` is `ours_ms` of the first condition, `ratio` is
`baseline_ms` / `ours_ms`, and `of_all` is the time of all epochs of the first condition divided by `ours_ms`. The
replicates of a condition are trained as one stack; times are those of the stack.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from modis_dist.train.journal import read
from tools.bench.measure import Row
from tools.bench.sweep import run

METRIC = "val/balanced_accuracy"
LAST = 5  # epochs whose mean is the final metric of a preset
CLOSE = 0.005


@dataclass(frozen=True)
class Curve:
    """Metric of one replicate after every epoch, and the seconds since the start of its training."""

    values: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def end(self) -> float:
        """Return the mean of the last epochs."""
        return fmean(self.values[-LAST:])

    def reaches(self, aim: float) -> int | None:
        """Return the first epoch, from 1, that reaches ``aim``, as does the mean of the five from it on; or None."""
        means = [fmean(self.values[n : n + LAST]) for n in range(len(self.values))]
        good = (n for n, (value, mean) in enumerate(zip(self.values, means, strict=True), 1) if min(value, mean) >= aim)
        return next(good, None)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("study", type=Path, help="study with one condition per preset, `published` first")
    parser.add_argument("--out", type=Path, default=None, help="output folder of the study (default temporary)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study")


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for each condition."""
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "study"
        if not (out / "summary.json").exists():
            run(
                "tune",
                arguments.study,
                "--out",
                out,
                *(word for setting in arguments.set for word in ("--set", setting)),
            )
        curves_by_condition = curves(out)
    yield from compared(curves_by_condition)


def curves(out: Path) -> dict[str, list[Curve]]:
    """Return the curves of the search trials of a finished study by condition."""
    trials = json.loads((out / "manifest.json").read_text())["trials"]
    times = journal_seconds(out)
    by_condition: dict[str, list[Curve]] = {}
    for trial in trials:
        history: list[dict[str, Any]] = json.loads((out / "trials" / trial["id"] / "history.json").read_text())
        validated = [row for row in history if row.get(METRIC) is not None]
        seconds = tuple(times[trial["id"]][int(row["epoch"])] for row in validated)
        by_condition.setdefault(trial["condition"], []).append(Curve(tuple(row[METRIC] for row in validated), seconds))
    return by_condition


def journal_seconds(out: Path) -> dict[str, dict[int, float]]:
    """Return, for each trial, the seconds from the start of its training to the end of each epoch."""
    seconds: dict[str, dict[int, float]] = {}
    for folder in (out / "packs").iterdir():
        began: dict[str, float] = {}
        for record in read(folder / "journal.jsonl"):
            at, trial = record["time_ms"] / 1000, record.get("trial")
            if trial is None:
                continue
            began.setdefault(trial, at)
            if record["kind"] == "metrics":
                seconds.setdefault(trial, {})[int(record["step"])] = at - began[trial]
    return seconds


def compared(by_condition: Mapping[str, list[Curve]]) -> Iterator[Row]:
    """Yield a row for each condition, compared with the first."""
    first = next(iter(by_condition.values()))
    aims = [curve.end - CLOSE for curve in first]
    whole = median(curve.seconds[-1] for curve in first)
    base = None
    for condition, replicates in by_condition.items():
        epochs = [curve.reaches(aim) for curve, aim in zip(replicates, aims, strict=True)]
        seconds = _median(
            curve.seconds[epoch - 1] if epoch else inf for curve, epoch in zip(replicates, epochs, strict=True)
        )
        base = base or seconds
        ends = [curve.end for curve in replicates]
        yield {
            "preset": condition,
            "replicates": len(replicates),
            "end": fmean(ends),
            "sd": stdev(ends) if len(ends) > 1 else None,
            "reached": sum(epoch is not None for epoch in epochs),
            "epochs": _median(epoch or inf for epoch in epochs),
            "baseline_ms": base and 1e3 * base,
            "ours_ms": seconds and 1e3 * seconds,
            "ratio": base / seconds if base and seconds else None,
            "of_all": whole / seconds if seconds else None,
        }


def _median(values: Iterable[float]) -> float | None:
    """Return the median; None if it is infinite (never reached)."""
    middle = median(values)
    return middle if isfinite(middle) else None
