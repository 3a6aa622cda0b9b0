"""Cost of MLflow for the trainings of a study: no MLflow, a SQLite file, a server that hangs, a server that refuses.

`python tools/mlflow_cost.py` trains the same small study on this machine's cores with each of the four in turn, several
times. Its epochs take a fraction of a second, so MLflow has far more to do than in a real study. Two metrics of the
later half of the epochs, when the follower has imported MLflow. "taken": seconds that the training's threads were
runnable and waited for a core (counted by Linux), as a share of their CPU time, minus the share without MLflow in the
same turn; the aim is 1 %. "seconds": the ratio of training times, which varies by more than that on most machines. Run
it on an idle machine.

Exit code 0 within the aim, 3 above it.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from modis_dist.config import yaml12
from modis_dist.train.journal import read

KINDS = ("none", "sqlite", "hangs", "refuses")
AIM = 0.01
TRIALS = 4
LOADED = 1 / 2  # of the epochs; MLflow is loaded by then


def study(*, epochs: int, store: Path, mlflow: dict[str, Any]) -> dict[str, Any]:
    """Return a study of four trials in one stack."""
    return {
        "name": "mlflow_cost",
        "data": {"store": str(store), "split": {"test_fraction": 0.2, "validation_fraction": 0.2}},
        "model": {"latent": 16, "ratios": [0.25, 0.125], "discriminator": [64, 32]},
        "optim": {"epochs": epochs},
        "trainer": {"checkpoint_every": 10},
        "sweep": {
            "grid": {"objective.beta": [1e-4, 1e-3, 1e-2, 1e-1]},
            "executor": "local",
            "probe": False,
            "mlflow": mlflow,
        },
    }


def train(path: Path, out: Path) -> None:
    """Train one study in this process and write the resources it used; stop after the search."""
    from modis_dist.cli import main
    from modis_dist.cli.display import SweepBars
    from modis_dist.study import run

    half = TRIALS * yaml12.read(path)["optim"]["epochs"] * LOADED
    used: dict[str, dict[str, float]] = {}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def update(_: SweepBars, *, epochs: int, **__: object) -> None:
        if epochs < half or "at_half" not in used:
            used["at_half"] = seconds(out)
        used["at_end"] = seconds(out)

    run.grouped = stop
    SweepBars.update = update
    main.run(["tune", str(path), "--out", str(out)])
    with suppress(psutil.NoSuchProcess):
        for process in followers(out):
            process.kill()
    (out / "used.json").write_text(json.dumps(used))


def followers(out: Path) -> list[psutil.Process]:
    """Return the processes that send a run folder to MLflow."""
    return [child for child in psutil.Process().children() if str(out) in child.cmdline()]


def seconds(out: Path) -> dict[str, float]:
    """Return CPU seconds of this process's threads, seconds they waited for a core, CPU seconds of the follower."""
    counts = [file.read_text().split() for file in Path("/proc/self/task").glob("*/schedstat")]
    times = [process.cpu_times() for process in followers(out)]
    return {
        "on_core": sum(int(count[0]) for count in counts) / 1e9,
        "ready": sum(int(count[1]) for count in counts) / 1e9,
        "sending": sum(time.user + time.system for time in times),
    }


@contextmanager
def hanging() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refusing() -> str:
    """Return an address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def measure(path: Path, out: Path) -> dict[str, float]:
    """Train one study in a process; return the times of its search."""
    command = [sys.executable, __file__, "--train", str(path), str(out)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    records = [record for file in out.glob("packs/*/journal.jsonl") for record in read(file)]
    started = min(record["time_ms"] for record in records)
    ends: dict[int, int] = {}
    for record in records:
        if record["kind"] == "metrics":
            ends[record["step"]] = max(ends.get(record["step"], 0), record["time_ms"])
    loaded = max(1, int(len(ends) * LOADED))
    later_s = (max(ends.values()) - ends[loaded]) / 1000
    used = json.loads((out / "used.json").read_text())
    later = {name: used["at_end"][name] - used["at_half"][name] for name in used["at_end"]}
    return {
        "stage_s": (max(ends.values()) - started) / 1000,
        "later_s": later_s,
        "sending_s": used["at_end"]["sending"],
        "waiting": later["ready"] / later["on_core"],
    }


def ratios_to_none(turns: list[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
    """Return ratios to the run without MLflow: median, minimum and maximum over the turns."""
    result = {}
    for kind in KINDS[1:]:
        ratios = [turn[kind][name] / turn["none"][name] for turn in turns]
        result[kind] = {"ratio": round(median(ratios), 4), "from": round(min(ratios), 4), "to": round(max(ratios), 4)}
    return result


def main() -> int:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4, help="number of comparisons")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    parser.add_argument("--train", nargs=2, type=Path, metavar=("STUDY", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(*options.train)
        return 0
    from modis_dist.config.run import Simulate
    from modis_dist.data.simulate import simulate
    from modis_dist.integrations.mlflow import store as mlflow_store

    began = time.monotonic()
    turns: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name, hanging() as hangs:
        folder = Path(name)
        simulate(Simulate(samples=options.samples, classes=5, seed=1), folder / "store")
        mlflow_store.connect(mlflow_store.default_uri(folder))  # creating its tables takes longer than this training
        settings = {
            "none": {"enabled": False},
            "sqlite": {},
            "hangs": {"tracking_uri": hangs},
            "refuses": {"tracking_uri": refusing()},
        }
        for kind, mlflow in settings.items():
            tree = study(epochs=options.epochs, store=folder / "store", mlflow=mlflow)
            (folder / f"{kind}.yaml").write_text(yaml12.dump(tree))
        order = [(turn, kind) for turn in range(options.turns) for kind in (KINDS, KINDS[::-1])[turn % 2]]
        for turn, kind in track(order, "measuring", console=Console(stderr=True)):
            if len(turns) == turn:
                turns.append({})
            out = folder / f"{turn}-{kind}"
            out.mkdir()
            shutil.copy(folder / mlflow_store.DATABASE, out)
            turns[turn][kind] = measure(folder / f"{kind}.yaml", out)
    report: dict[str, Any] = {"turns": turns, "seconds": round(time.monotonic() - began)}
    report |= {name: ratios_to_none(turns, name) for name in ("stage_s", "later_s")}
    report["sending_s"] = {kind: round(median(turn[kind]["sending_s"] for turn in turns), 2) for kind in KINDS[1:]}
    taken = {kind: [turn[kind]["waiting"] - turn["none"]["waiting"] for turn in turns] for kind in KINDS[1:]}
    report["taken"] = {kind: round(median(shares), 5) for kind, shares in taken.items()}
    report["within_aim"] = max(report["taken"].values()) <= AIM
    if options.json:
        print(json.dumps(report, indent=2))
        return 0 if report["within_aim"] else 3
    print(f"share of CPU time taken from the training; training seconds relative to no MLflow ({options.turns} turns)")
    for kind in KINDS[1:]:
        ratio = report["later_s"][kind]
        print(
            f"{kind:8}  taken {100 * report['taken'][kind]:.2f} %   follower {report['sending_s'][kind]:.1f} s   "
            f"seconds {ratio['ratio']:.3f} ({ratio['from']:.3f} to {ratio['to']:.3f})"
        )
    return 0 if report["within_aim"] else 3


if __name__ == "__main__":
    sys.exit(main())
