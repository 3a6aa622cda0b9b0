"""How much of a sweep's time is training: twelve small trials as a study, packed and not, and one by one as `train`.

`python tools/sweep_throughput.py` runs the same twelve trainings three times. Training is what the journals say, from a
pack's start to its end (validation and judging included), times the cores it was given; the ratio is that over the
cores' whole time. The study also chooses, refits and tests, which twelve single trainings do not. Run it on an idle
machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from modis_dist.config import yaml12
from modis_dist.train.journal import read

COMMAND = [sys.executable, "-m", "modis_dist"]
CORES = len(os.sched_getaffinity(0))


def study(*, samples: int, epochs: int) -> dict[str, Any]:
    """Three weights in four folds: twelve trials."""
    return {
        "name": "throughput",
        "data": {"simulate": {"samples": samples, "classes": 5, "seed": 1}},
        "model": {"latent": 32, "ratios": [0.5, 0.25]},
        "optim": {"epochs": epochs},
        "trainer": {"checkpoint_every": 10},
        "sweep": {"grid": {"objective.beta": [1e-4, 1e-3, 1e-2]}, "folds": 4},
    }


def run(*arguments: str | Path) -> float:
    """Wall seconds of a command; its output goes nowhere."""
    began = time.monotonic()
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} ended with {done.returncode}: {done.stderr}")
    return time.monotonic() - began


def core_seconds(folder: Path, *, threads: int) -> float:
    """A journal's time from its first to its last record, times the cores."""
    times = [record["time_ms"] / 1000 for record in read(folder / "journal.jsonl")]
    return (max(times) - min(times)) * threads


def as_study(path: Path, out: Path, *options: str) -> dict[str, float]:
    """The twelve trials by `tune`."""
    wall = run("tune", path, "--out", out, *options)
    trained = [
        (folder, json.loads((folder / "pack.json").read_text())["threads"]) for folder in (out / "packs").iterdir()
    ]
    used = sum(core_seconds(folder, threads=threads) for folder, threads in trained)
    return {"wall_s": wall, "training_core_s": used, "ratio": used / (CORES * wall), "packs": len(trained)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    options = parser.parse_args()
    report: dict[str, Any] = {"cores": CORES, "samples": options.samples, "epochs": options.epochs}
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bars:
        folder = Path(name)
        path = folder / "study.yaml"
        path.write_text(yaml12.dump(study(samples=options.samples, epochs=options.epochs)))
        task = bars.add_task("packed", total=14)
        report["packed"] = as_study(path, folder / "packed")
        bars.update(task, advance=1, description="one trial a pack")
        report["unpacked"] = as_study(path, folder / "unpacked", "--set", "sweep.packing.enabled=false")
        bars.update(task, advance=1, description="one by one")
        listed = json.loads((folder / "packed" / "manifest.json").read_text())["trials"]
        wall = used = 0.0
        store = next((folder / "packed").glob("store-*"))
        for trial in listed:
            settings = folder / "packed" / "trials" / trial["id"] / "run.yaml"
            out = folder / "single" / trial["id"]
            wall += run("train", settings, "--out", out, "--set", "data.simulate=null", "--set", f"data.store={store}")
            used += core_seconds(out, threads=CORES)
            bars.update(task, advance=1)
        report["single"] = {
            "wall_s": wall,
            "training_core_s": used,
            "ratio": used / (CORES * wall),
            "packs": len(listed),
        }
    for kind in ("packed", "unpacked", "single"):
        report[kind]["faster"] = report["single"]["wall_s"] / report[kind]["wall_s"]
        report[kind] = {key: round(value, 3) for key, value in report[kind].items()}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for kind, told in (("packed", "tune, stacked"), ("unpacked", "tune, one a pack"), ("single", "train, one by one")):
        held = report[kind]
        print(
            f"{told:18} {held['wall_s']:7.1f} s   training {held['ratio']:.2f} of it   {held['faster']:.2f} x as fast"
        )


if __name__ == "__main__":
    main()
