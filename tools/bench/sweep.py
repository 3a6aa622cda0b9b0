"""Time of a study of twelve small trials: as stacks, as packs of one trial, and as consecutive `train` commands.

python -m tools.bench sweep
python -m tools.bench sweep --samples 1200 --epochs 60 --json

`training` is the fraction of core time spent in packs, from start to end of each (validation and evaluation included),
read from the journals. The studies also select, refit and test, which the `train` commands do not; `packs` includes the
refit. `ours_ms` and `baseline_ms` are the times of all twelve trials, and `ratio` is the speed-up over the `train`
commands. The runs take minutes and are not interleaved: measure twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modis_dist.config import yaml12
from modis_dist.train.journal import read
from tools.bench.measure import Row

COMMAND = [sys.executable, "-m", "modis_dist"]
CORES = len(os.sched_getaffinity(0))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--samples", type=int, default=1200, help="samples of the simulated data (default 1200)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each training (default 60)")
    parser.add_argument("--folds", type=int, default=4, help="folds of the study, three trials each (default 4)")


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each of the three ways, on the same data."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "study.yaml"
        path.write_text(yaml12.dump(study(samples=arguments.samples, epochs=arguments.epochs, folds=arguments.folds)))
        times = {
            "tune, stacked": as_study(path, folder / "stacked"),
            "tune, one trial per pack": as_study(path, folder / "single", "--set", "sweep.packing.enabled=false"),
            "train, one by one": one_by_one(folder / "stacked", folder / "alone"),
        }
        singly_s = times["train, one by one"][0]
        for way, (wall_s, core_s, packs) in times.items():
            yield {
                "way": way,
                "packs": packs,
                "threads": CORES,
                "baseline_ms": 1e3 * singly_s,
                "ours_ms": 1e3 * wall_s,
                "ratio": singly_s / wall_s,
                "training": core_s / (CORES * wall_s),
            }


def study(*, samples: int, epochs: int, folds: int) -> dict[str, Any]:
    """Return a study of three weights and ``folds`` folds."""
    return {
        "name": "throughput",
        "data": {"simulate": {"samples": samples, "classes": 5, "seed": 1}},
        "model": {"latent": 32, "ratios": [0.5, 0.25]},
        "optim": {"epochs": epochs},
        "trainer": {"checkpoint_every": 10},
        "sweep": {"grid": {"objective.beta": [1e-4, 1e-3, 1e-2]}, "folds": folds},
    }


def as_study(path: Path, out: Path, *options: str) -> tuple[float, float, int]:
    """Return wall seconds of a study with `tune`, core seconds of its trainings, and the number of packs."""
    wall_s = run("tune", path, "--out", out, *options)
    packs = [
        (folder, json.loads((folder / "pack.json").read_text())["threads"]) for folder in (out / "packs").iterdir()
    ]
    return wall_s, sum(core_seconds(folder, threads=threads) for folder, threads in packs), len(packs)


def one_by_one(stacked: Path, out: Path) -> tuple[float, float, int]:
    """Return the same for the same trainings with `train`."""
    trials = [trial["id"] for trial in json.loads((stacked / "manifest.json").read_text())["trials"]]
    store = next(stacked.glob("store-*"))
    wall_s = core_s = 0.0
    for trial in trials:
        settings = stacked / "trials" / trial / "run.yaml"
        given = ["--set", "data.simulate=null", "--set", f"data.store={store}"]
        wall_s += run("train", settings, "--out", out / trial, *given)
        core_s += core_seconds(out / trial, threads=CORES)
    return wall_s, core_s, len(trials)


def core_seconds(folder: Path, *, threads: int) -> float:
    """Return the time from the first to the last record of a journal, times the threads."""
    times: list[float] = [record["time_ms"] / 1000 for record in read(folder / "journal.jsonl")]
    return (max(times) - min(times)) * threads


def run(*arguments: str | Path) -> float:
    """Run a command, discarding its output; return its wall seconds."""
    began = time.monotonic()
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} ended with {done.returncode}: {done.stderr}")
    return time.monotonic() - began
