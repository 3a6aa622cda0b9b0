"""Ray Tune as the executor of packs: every pack is one Tune trial, started in a worker that is used again.

The list of trials and what is done of it are ours; Ray is told what is left and restarts a worker that dies.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from modis_dist.config.study import Resources
from modis_dist.errors import ConfigError, Interrupted
from modis_dist.launch.ray_cluster import private_cluster
from modis_dist.sweep.execute import Pack, attempt, load_pack, save_pack
from modis_dist.sweep.local import crashed
from modis_dist.sweep.resources import cores as available_cores
from modis_dist.sweep.resources import mistakes
from modis_dist.train.ports import NullReporter
from modis_dist.train.signals import StopFile, on_signal

DEATHS = 2  # of a worker before its pack is given up
STOP = "stop"
WORKER_DIED = f"the worker died {DEATHS + 1} times (out of memory?)"


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """As many packs at a time as the cores, or GPUs, allow. Ray is started at the first pack, stopped on leaving."""

    def __init__(self, resources: Resources, *, device: str = "auto") -> None:
        gpus, cores = 0 if device == "cpu" else _gpu_count(), available_cores()
        _check(resources, device=device, gpus=gpus)
        self._gpus = resources.gpus if resources.gpus is not None else min(1.0, gpus)
        at_once = int(gpus / self._gpus) if self._gpus else cores
        self.threads = resources.cpus or max(1, cores // at_once)
        self.slots = max(1, min(at_once, cores // self.threads))
        self._resources = {"cpus": self.threads * self.slots, "gpus": gpus if self._gpus else 0}
        self._open = ExitStack()
        self._folder: Path | None = None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; returns why trials crashed, by id. Raises ``Interrupted`` after a signal."""
        stop = out / STOP
        stop.unlink(missing_ok=True)
        at_once = min(self.slots, len(packs))  # few packs share all the cores
        threads = self._resources["cpus"] // at_once
        folders = [str(save_pack(out, pack, threads=threads)) for pack in packs]
        settings = {"out": str(out), "store": str(store)}
        if self._folder is None:
            with on_signal(partial(_ask_to_stop, stop)):
                self._folder = self._open.enter_context(private_cluster(**self._resources))
        said: dict[str, str | None] = {}
        with on_signal(partial(_ask_to_stop, stop)):  # anew: starting Ray puts its own handler in the place of ours
            if not stop.exists():
                said = self._fit(folders, settings, threads=threads, storage=self._folder / packs[0].id)
        if stop.exists():
            reason = stop.read_text()
            stop.unlink()
            raise Interrupted(f"{reason}; the same command continues")
        reasons: dict[str, str] = {}
        for pack, folder in zip(packs, folders, strict=True):
            reasons |= crashed(pack, said.get(folder, WORKER_DIED), out=out)
        return reasons

    def _fit(
        self, folders: list[str], settings: Mapping[str, Any], *, threads: int, storage: Path
    ) -> dict[str, str | None]:
        """What became of each pack: None, or why it crashed."""
        from ray import tune

        resources = {"cpu": threads, "gpu": self._gpus}
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
    pack, threads = load_pack(Path(config["pack"]))
    torch.set_num_threads(pack.trials[0].run.trainer.threads or threads)
    reason: str | None = None
    try:
        if stop.requested() is None:
            reason = attempt(pack, out=out, store=Path(config["store"]), reporter=NullReporter(), stop=stop)
    except Interrupted:
        pass  # saved; the driver knows
    return {"pack": config["pack"], "crashed": reason}


def _check(resources: Resources, *, device: str, gpus: int) -> None:
    problems = []
    if device not in {"auto", "cpu", "cuda"}:
        problems.append(f"trainer.device: {device}: Ray gives every pack a GPU of its own; say cuda")
    problems += mistakes(resources, gpus=gpus)
    if problems:
        raise ConfigError(problems, source="study")


def _ask_to_stop(file: Path, reason: str) -> None:
    file.write_text(reason)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
