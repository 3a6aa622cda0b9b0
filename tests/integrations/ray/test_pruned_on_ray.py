"""A pruned study on a real Ray: promotions at rungs depend neither on the executor nor on killed workers. Slow."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from modis_dist.cli.main import run as command
from tests.study.kills import trains
from tests.study.toy_study import write_store, write_study

PATIENCE_S = 120.0
SWEEP = {
    "grid": {"objective.beta": [1e-4, 1e-3, 1e-2]},
    "pruning": {"min_epochs": 1, "factor": 3},
    "packing": {"enabled": False},
    "folds": 1,
    "probe": False,
}


def kill_a_worker(out: Path, killed: list[int]) -> None:
    """Kill a Ray worker that trains, once a checkpoint is written."""
    end = time.monotonic() + PATIENCE_S
    while not list(out.glob("packs/*/last/step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    victim = next(process for process in psutil.Process().children(recursive=True) if trains(process))
    victim.kill()
    killed.append(victim.pid)


def without_times(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in {"seconds", "mlflow"}}


@pytest.mark.slow
def test_a_study_on_ray_prunes_the_same_trials_as_a_local_one_even_if_a_worker_is_killed(tmp_path: Path) -> None:
    store, killed = write_store(tmp_path / "store"), list[int]()
    for executor in ("local", "ray"):
        study, out = write_study(tmp_path / f"{executor}.yaml", store, executor=executor, **SWEEP), tmp_path / executor
        killer = threading.Thread(target=kill_a_worker, args=(out, killed), daemon=True)
        if executor == "ray":
            killer.start()
        assert command(["tune", str(study), "--out", str(out), "--set", "optim.epochs=6"]) == 0
    killer.join()
    assert len(killed) == 1
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "local")
    assert without_times(tmp_path / "ray")["trials"] == {"total": 3, "done": 1, "failed": 0, "pruned": 2}
