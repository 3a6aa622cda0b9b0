"""Ray Tune as the executor of packs: every pack is one Tune trial, started in a worker that is used again.

The list of trials and what is done of it are ours; Ray is told what is left and restarts a worker that dies.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modis_dist.config.study import Resources
from modis_dist.errors import Interrupted
from modis_dist.launch.ray_cluster import private_cluster
from modis_dist.sweep.execute import Pack, attempt, load_pack, save_pack
from modis_dist.sweep.local import crashed
from modis_dist.train.ports import NullReporter
from modis_dist.train.signals import StopFile, on_signal

DEATHS = 2  # of a worker before its pack is given up
STOP = "stop"


class RayExecutor:
    """As many packs at a time as the cores, or GPUs, allow."""

    def __init__(self, resources: Resources) -> None:
        self._gpus = _gpus(resources)
        total = _gpu_count()
        cores = len(os.sched_getaffinity(0))
        by_gpu = int(total / self._gpus) if self._gpus else cores
        self._cpus = resources.cpus or max(1, cores // by_gpu if self._gpus else 1)
        self.slots = max(1, min(by_gpu, cores // self._cpus))
        self.threads = self._cpus
        self._total_gpus = total if self._gpus else 0

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; returns why trials crashed, by id. Raises ``Interrupted`` after a signal."""
        stop = out / STOP
        stop.unlink(missing_ok=True)
        folders = [str(save_pack(out, pack)) for pack in packs]
        settings = {"out": str(out), "store": str(store), "threads": self.threads}
        cpus = self._cpus * min(self.slots, len(packs))
        with (
            on_signal(partial(_ask_to_stop, stop)),
            private_cluster(cpus=cpus, gpus=self._total_gpus) as tmp,
        ):
            said = self._fit(folders, settings, storage=tmp / "tune")
        if stop.exists():
            reason = stop.read_text()
            stop.unlink()
            raise Interrupted(f"{reason}; the same command continues")
        reasons: dict[str, str] = {}
        for pack, folder in zip(packs, folders, strict=True):
            reasons |= crashed(pack, said.get(folder, "the worker died without a word"), out=out)
        return reasons

    def _fit(self, folders: list[str], settings: Mapping[str, Any], *, storage: Path) -> dict[str, str | None]:
        """What became of each pack: None, or why it crashed."""
        from ray import tune

        resources = {"cpu": self._cpus, "gpu": self._gpus}
        tuner = tune.Tuner(
            tune.with_resources(train_pack, resources),
            param_space={"pack": tune.grid_search(folders), **settings},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=self.slots),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS),
            ),
        )
        said: dict[str, str | None] = {}
        for result in tuner.fit():
            if result.error is None and result.metrics:
                said[result.metrics["pack"]] = result.metrics["crashed"]
        return said


def train_pack(config: Mapping[str, Any]) -> dict[str, Any]:
    """One pack in a worker of Ray. Returns the pack and why it crashed, or None."""
    import torch

    os.umask(0o077)
    out = Path(config["out"])
    stop = StopFile(out / STOP)
    pack = load_pack(Path(config["pack"]))
    torch.set_num_threads(pack.trials[0].run.trainer.threads or config["threads"])
    reason: str | None = None
    try:
        if stop.requested() is None:
            reason = attempt(pack, out=out, store=Path(config["store"]), reporter=NullReporter(), stop=stop)
    except Interrupted:
        pass  # saved; the driver knows
    return {"pack": config["pack"], "crashed": reason}


def _ask_to_stop(file: Path, reason: str) -> None:
    file.write_text(reason)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _gpus(resources: Resources) -> float:
    if resources.gpus is not None:
        return resources.gpus
    return 1.0 if _gpu_count() else 0.0
