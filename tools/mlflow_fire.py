"""What MLflow costs the trainings of a study: without it, with a SQLite file, a hanging and a refusing server.

`python tools/mlflow_fire.py` trains the same small study in this machine's cores once for each of the four, again and
again in turn. Its epochs take a fraction of a second: MLflow gets far more to do than in any real study. Two figures of
the later half of the epochs, when MLflow is loaded. The seconds that the threads of the training stood ready and waited
for a core (Linux counts them), as a share of its time on the cores, less the share without MLflow in the same turn:
what the process that sends takes from the training; the aim is 1 %. And the seconds of training against those without
MLflow, which vary with the machine by more than that. Run it on an idle machine.

Exit code 0 where what is taken is within the aim, 3 where it is more.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def study(*, epochs: int, store: Path) -> dict[str, Any]:
    """Four trials in one stack, in the driver's own process, where MLflow can disturb them most."""
    return {
        "name": "fire",
        "data": {"store": str(store), "split": {"test_fraction": 0.2, "validation_fraction": 0.2}},
        "model": {"latent": 16, "ratios": [0.25, 0.125], "discriminator": [64, 32]},
        "optim": {"epochs": epochs},
        "trainer": {"checkpoint_every": 10},
        "sweep": {"grid": {"objective.beta": [1e-4, 1e-3, 1e-2, 1e-1]}, "executor": "local", "probe": False},
    }


def live(kind: str, uri: str, path: Path, out: Path) -> None:
    """One study in this process; writes what it used. Stops after the search: the rest is not measured."""
    from modis_dist.cli import main, tune
    from modis_dist.integrations.mlflow.mirror import BackgroundMirror, NullMirror
    from modis_dist.study import run

    half = TRIALS * yaml12.read(path)["optim"]["epochs"] * LOADED
    used: dict[str, dict[str, float]] = {}
    told = [0]
    mirrors = NullMirror if kind == "none" else BackgroundMirror
    feed = mirrors.feed

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def counted(self: Any, records: Sequence[Mapping[str, Any]]) -> None:
        if told[0] < half or "at_half" not in used:
            used["at_half"] = seconds()
        used["at_end"] = seconds()  # what is sent when all is trained slows nothing
        told[0] += sum(record["kind"] == "metrics" for record in records)
        feed(self, records)

    def close(self: Any, timeout_s: float) -> list[str]:
        del timeout_s
        if kind != "none":
            self._mirror.close()
        return []

    run.grouped = stop
    mirrors.feed, mirrors.close = counted, close
    if kind == "none":
        tune._mirror = lambda *_: NullMirror()
    main.run(["tune", str(path), "--out", str(out), *(["--set", f"sweep.mlflow.tracking_uri={uri}"] if uri else [])])
    (out / "used.json").write_text(json.dumps(used))


def seconds() -> dict[str, float]:
    """That the threads of this process have been on a core, stood ready without one, and its children were on one."""
    counts = [file.read_text().split() for file in Path("/proc/self/task").glob("*/schedstat")]
    children = [child.cpu_times() for child in psutil.Process().children()]
    return {
        "on_core": sum(int(count[0]) for count in counts) / 1e9,
        "ready": sum(int(count[1]) for count in counts) / 1e9,
        "sending": sum(times.user + times.system for times in children),
    }


@contextmanager
def hanging() -> Iterator[str]:
    """Address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refusing() -> str:
    """Address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def measured(kind: str, uri: str, path: Path, out: Path) -> dict[str, float]:
    """Seconds of one study's search."""
    command = [sys.executable, __file__, "--live", kind, uri, str(path), str(out)]
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


def compared(turns: list[dict[str, dict[str, float]]], figure: str) -> dict[str, Any]:
    """Ratios to no MLflow: the middle one, and the smallest and largest of all turns."""
    found = {}
    for kind in KINDS[1:]:
        ratios = [turn[kind][figure] / turn["none"][figure] for turn in turns]
        found[kind] = {"ratio": round(median(ratios), 4), "from": round(min(ratios), 4), "to": round(max(ratios), 4)}
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4, help="comparisons of all four")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    parser.add_argument("--live", nargs=4, metavar=("KIND", "URI", "STUDY", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live:
        kind, uri, path, out = options.live
        live(kind, uri, Path(path), Path(out))
        return 0
    from modis_dist.config.run import Simulate
    from modis_dist.data.simulate import simulate
    from modis_dist.integrations.mlflow import store as mlflow_store

    began = time.monotonic()
    turns: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name, hanging() as hangs:
        folder = Path(name)
        simulate(Simulate(samples=options.samples, classes=5, seed=1), folder / "store")
        mlflow_store.connect(mlflow_store.default_uri(folder))  # making its tables takes longer than the training here
        path = folder / "study.yaml"
        path.write_text(yaml12.dump(study(epochs=options.epochs, store=folder / "store")))
        uris = {"none": "", "sqlite": "", "hangs": hangs, "refuses": refusing()}
        order = [(turn, kind) for turn in range(options.turns) for kind in (KINDS, KINDS[::-1])[turn % 2]]
        for turn, kind in track(order, "measuring", console=Console(stderr=True)):
            if len(turns) == turn:
                turns.append({})
            out = folder / f"{turn}-{kind}"
            out.mkdir()
            shutil.copy(folder / mlflow_store.DATABASE, out)
            turns[turn][kind] = measured(kind, uris[kind], path, out)
    report: dict[str, Any] = {"turns": turns, "seconds": round(time.monotonic() - began)}
    report |= {figure: compared(turns, figure) for figure in ("stage_s", "later_s")}
    report["sending_s"] = {kind: round(median(turn[kind]["sending_s"] for turn in turns), 2) for kind in KINDS[1:]}
    taken = {kind: [turn[kind]["waiting"] - turn["none"]["waiting"] for turn in turns] for kind in KINDS[1:]}
    report["taken"] = {kind: round(median(shares), 5) for kind, shares in taken.items()}
    report["within_aim"] = max(report["taken"].values()) <= AIM
    if options.json:
        print(json.dumps(report, indent=2))
        return 0 if report["within_aim"] else 3
    print(f"share of a core taken from the training, seconds against none ({options.turns} turns)")
    for kind in KINDS[1:]:
        ratio = report["later_s"][kind]
        print(
            f"{kind:8}  taken {100 * report['taken'][kind]:.2f} %   MLflow's own {report['sending_s'][kind]:.1f} s   "
            f"seconds {ratio['ratio']:.3f} ({ratio['from']:.3f} to {ratio['to']:.3f})"
        )
    return 0 if report["within_aim"] else 3


if __name__ == "__main__":
    sys.exit(main())
