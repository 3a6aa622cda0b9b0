"""An executor that trains packs on Ray: each pack is one Tune trial in a reused worker.

Trials and their state stay in the study's folder; Ray receives the unfinished packs and restarts workers that die.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from modis_dist.config.study import Resources
from modis_dist.execution.memory import ConcurrencyLimit, Footprint, packs_that_fit
from modis_dist.execution.resources import Cluster, resource_mistakes, worker_mistakes
from modis_dist.execution.run_pack import Pack, crash_reasons, load_pack, save_pack, try_pack
from modis_dist.integrations.ray.head_watch import while_ray_lives
from modis_dist.integrations.ray.private_cluster import RayBackend
from modis_dist.integrations.ray.train import RESTART_LOG, STOP, on_ranks
from modis_dist.runtime.errors import ConfigError, DiskFailed, Interrupted, MachineFailed, ModisError, RunFailed
from modis_dist.runtime.signals import StopFile, on_signal
from modis_dist.runtime.text import shown
from modis_dist.train.process_group import ALONE, RankSpec

DEATHS = 2  # of a worker before its pack is given up
RESOURCES_OF_LAUNCHER = {"cpu": 0, "node:__internal_head__": 0.001}  # runs on Ray's head node, waits for its ranks
WORKER_DIED = f"the worker died {DEATHS + 1} times (out of memory?)"


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Executor that trains as many packs at once as cores or GPUs allow. Ray starts with the first pack."""

    def __init__(self, resources: Resources, *, backend: RayBackend, device: str = "auto", workers: int = 1) -> None:
        self._backend = backend
        self._cluster = backend.cluster.without_gpus() if device == "cpu" else backend.cluster
        if problems := pack_mistakes(resources, device=device, cluster=self._cluster, workers=workers):
            raise ConfigError(problems, source="study")
        self._gpus = resources.gpus if resources.gpus is not None else min(1.0, self._cluster.gpus)
        self._workers = workers
        max_packs = max(1, self._cluster.slots(threads=1, gpus=self._gpus) // workers)
        self.threads = resources.cpus // workers if resources.cpus else self._threads_of(max_packs)
        self.slots = max(1, self._cluster.slots(threads=self.threads, gpus=self._gpus) // workers)
        self._exit = ExitStack()
        self._folder: Path | None = None
        self._footprints: dict[int, Footprint | None] = {}

    def _threads_of(self, packs: int) -> int:
        """Return the threads of each worker if ``packs`` packs share all cores."""
        return self._cluster.threads(workers=packs * self._workers, gpus=self._gpus)

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; return crash reasons by trial id.

        Raises ``Interrupted`` after a signal, ``DiskFailed``, and ``MachineFailed`` if a GPU failed in every worker
        that tried the pack.
        """
        stop = out / STOP
        stop.unlink(missing_ok=True)
        settings = {"out": str(out), "store": str(store), "workers": self._workers, "gpus": self._gpus}
        with on_signal(stop.write_text):
            limit = self._concurrency(packs, out=out, store=store)
            threads = self._threads(limit.packs)
            folders = [str(save_pack(out, pack, threads=threads)) for pack in packs]
            if self._folder is None:
                self._folder = self._exit.enter_context(self._backend.ready(out=out, store=store))
            outcomes = self._train(folders, settings, limit, threads=threads)
        if stop.exists():
            reason = stop.read_text()
            stop.unlink()
            raise Interrupted(f"{reason}; rerun the same command to resume")
        reasons: dict[str, str] = {}
        for pack, folder in zip(packs, folders, strict=True):
            reasons |= crash_reasons(pack, outcomes.get(folder, WORKER_DIED), out=out)
        return reasons

    def _concurrency(self, packs: Sequence[Pack], *, out: Path, store: Path) -> ConcurrencyLimit:
        """Return the number of packs trained at once."""
        limit = ConcurrencyLimit(min(self.slots, len(packs)), int(1 / self._gpus) if 0 < self._gpus < 1 else 1)
        return packs_that_fit(
            packs,
            limit,
            machine=self._cluster,
            workers=self._workers,
            threads=self._threads(limit.packs),
            out=out,
            store=store,
            known=self._footprints,
        )

    def _threads(self, packs: int) -> int:
        """Return the threads of each worker; fewer packs than slots share all cores."""
        return self.threads if packs == self.slots else self._threads_of(packs)

    def _train(
        self, folders: list[str], settings: Mapping[str, Any], limit: ConcurrencyLimit, *, threads: int
    ) -> dict[str, str | None]:
        """Return the crash reason, or None, of each pack, except those whose worker died too often.

        When a worker dies between two packs, Tune gives up the next one, which had not started; it is submitted again.
        """
        storage, outcomes, left = Path(mkdtemp(dir=self._folder)), dict[str, str | None](), folders
        for turn in range(DEATHS + 1):
            if not left or (Path(settings["out"]) / STOP).exists():
                break
            outcomes |= self._fit(left, {**settings, "storage": str(storage)}, limit, threads=threads, turn=turn)
            left = [folder for folder in left if folder not in outcomes and _starts(storage, folder) <= DEATHS]
        return outcomes

    def _fit(
        self, folders: list[str], settings: Mapping[str, Any], limit: ConcurrencyLimit, *, threads: int, turn: int
    ) -> dict[str, str | None]:
        """Return the crash reason, or None, of each pack that Tune did not give up."""
        from ray import tune

        # The trial of a pack with several workers only waits for its ranks; `max_concurrent_trials` limits those.
        gpus = max(self._gpus, 1 / limit.per_gpu) if self._gpus else 0
        resources = {"cpu": threads, "gpu": gpus} if self._workers == 1 else RESOURCES_OF_LAUNCHER
        tuner = tune.Tuner(
            tune.with_resources(train_pack, resources),
            param_space={"pack": tune.grid_search(folders), **settings},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=limit.packs),
            run_config=tune.RunConfig(
                name=f"turn{turn}",
                storage_path=settings["storage"],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS),
            ),
        )
        results = while_ray_lives(tuner.fit)
        raise_machine_failure(results)
        return _outcomes(folders, results)


def raise_machine_failure(results: Iterable[Any]) -> None:
    """Raise the ``DiskFailed`` or ``MachineFailed`` of a pack in Tune's results."""
    for result in results:
        if disk_error := (result.metrics or {}).get("disk_error"):
            raise DiskFailed(disk_error)
        if isinstance(cause := getattr(result.error, "cause", None), MachineFailed):
            raise MachineFailed(str(cause))  # not NodeFailed: the GPU may be on another node than this process


def _outcomes(folders: Sequence[str], results: Iterable[Any]) -> dict[str, str | None]:
    """Return the crash reason, or None, of each pack, from Tune's results in the same order.

    A pack whose worker died has no entry.
    """
    outcomes: dict[str, str | None] = {}
    for folder, result in zip(folders, results, strict=False):  # an interrupted study has fewer results
        if result.error is None and result.metrics:
            outcomes[result.metrics["pack"]] = result.metrics["crashed"]
        elif (reason := _exception_line(result.error)) is not None:
            outcomes[folder] = reason
    return outcomes


def _exception_line(error: object) -> str | None:
    """Return the exception raised in a worker as one line; None if the worker died instead."""
    from ray.exceptions import RayActorError, RayTaskError

    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(cause, ModisError):
        return str(cause)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {shown(str(cause))}"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"its worker could not start: {shown(str(error).strip().splitlines()[-1])}"
    return None


def train_pack(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train one pack in a Ray worker; return the pack, its crash reason or None, and its disk error or None.

    Raises ``MachineFailed`` if a GPU failed: Tune then starts the pack in a new worker, at most ``DEATHS`` times.
    """
    os.umask(0o077)
    _note_start(Path(config["storage"]), config["pack"])
    reason: str | None = None
    disk_error: str | None = None
    try:
        if StopFile(Path(config["out"]) / STOP).requested() is None:
            reason = _try_pack(ALONE, config) if config["workers"] == 1 else _try_pack_on_ranks(config)
    except Interrupted:
        pass  # saved; the driver created the stop file
    except DiskFailed as error:
        disk_error = str(error)
    return {"pack": config["pack"], "crashed": reason, "disk_error": disk_error}


def _try_pack(spec: RankSpec, config: Mapping[str, Any]) -> str | None:
    out, (pack, threads) = Path(config["out"]), load_pack(Path(config["pack"]))
    stop = StopFile(out / STOP)
    return try_pack(pack, out=out, store=Path(config["store"]), stop=stop, threads=threads, spec=spec)


def _try_pack_on_ranks(config: Mapping[str, Any]) -> str | None:
    """Call ``_try_pack`` on several ranks, which Ray Train starts."""
    folder = Path(config["storage"]) / "ranks" / Path(config["pack"]).name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return on_ranks(
            _try_pack,
            config,
            workers=config["workers"],
            threads=load_pack(Path(config["pack"]))[1],
            gpus=config["gpus"],
            folder=folder,
            restart_log=Path(config["pack"]) / RESTART_LOG,
        )
    except (DiskFailed, MachineFailed):
        raise
    except RunFailed as error:
        return str(error)


def _note_start(storage: Path, pack: str) -> None:
    with (storage / f"starts-{Path(pack).name}").open("ab") as file:
        file.write(b".")


def _starts(storage: Path, pack: str) -> int:
    starts = storage / f"starts-{Path(pack).name}"
    return starts.stat().st_size if starts.exists() else 0


def pack_mistakes(resources: Resources, *, device: str, cluster: Cluster, workers: int) -> list[str]:
    """Return a problem for each resource of which a pack, with all its workers, needs more than the cluster has."""
    cpus = resources.cpus or workers
    threads = max(1, cpus // workers) if workers > 1 else 1
    problems = worker_mistakes(workers, threads=threads, device=device, cluster=cluster)
    if workers > 1 and cluster.gpus and (resources.gpus or 1.0) != 1.0:
        problems.append("sweep.resources.gpus: with several workers each has one GPU; remove this key")
    if cpus % workers:
        problems.append(f"sweep.resources.cpus: {cpus} is not a multiple of trainer.workers ({workers})")
    of_one_node = resources if workers == 1 else resources.model_copy(update={"cpus": None})
    return problems + resource_mistakes(of_one_node, cluster=cluster)
