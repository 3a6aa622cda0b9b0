"""Ray Tune as the executor of packs: every pack is one Tune trial, started in a worker that is used again.

The list of trials and what is done of it are ours; Ray is told what is left and restarts a worker that dies.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

from modis_dist.config.study import Resources
from modis_dist.execution.local import crashed
from modis_dist.execution.memory import ConcurrencyLimit, Footprint, packs_that_fit
from modis_dist.execution.resources import Cluster, mistakes, workers_mistakes
from modis_dist.execution.run_pack import Pack, attempt, load_pack, save_pack
from modis_dist.integrations.ray.head_watch import while_ray_lives
from modis_dist.integrations.ray.private_cluster import RayBackend
from modis_dist.integrations.ray.train import RECORD, STOP, ask_to_stop, on_ranks
from modis_dist.runtime.errors import ConfigError, DiskFailed, Interrupted, ModisError, RunFailed, shown
from modis_dist.runtime.signals import StopFile, on_signal
from modis_dist.train import cpu_settings
from modis_dist.train.callbacks import NullReporter
from modis_dist.train.process_group import RankSpec

DEATHS = 2  # of a worker before its pack is given up
WAITING = {"cpu": 0, "node:__internal_head__": 0.001}  # Ray's first node has one of these
WORKER_DIED = f"the worker died {DEATHS + 1} times (out of memory?)"


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """As many packs at a time as the cores, or GPUs, allow. Ray is made ready at the first pack, left at the end."""

    def __init__(self, resources: Resources, *, backend: RayBackend, device: str = "auto", workers: int = 1) -> None:
        self._backend = backend
        self._cluster = backend.cluster.without_gpus() if device == "cpu" else backend.cluster
        _check(resources, device=device, cluster=self._cluster, workers=workers)
        self._gpus = resources.gpus if resources.gpus is not None else min(1.0, self._cluster.gpus)
        self._workers = workers
        most = max(1, self._cluster.places(threads=1, gpus=self._gpus) // workers)
        self.threads = resources.cpus // workers if resources.cpus else self._shared_out(most)
        self.slots = max(1, self._cluster.places(threads=self.threads, gpus=self._gpus) // workers)
        self._open = ExitStack()
        self._folder: Path | None = None
        self._footprints: dict[int, Footprint | None] = {}

    def _shared_out(self, packs: int) -> int:
        """The threads of each worker where so many packs share all cores."""
        return self._cluster.threads(workers=packs * self._workers, gpus=self._gpus)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; returns why trials crashed, by id. Raises ``Interrupted`` after a signal, ``DiskFailed``."""
        stop = out / STOP
        stop.unlink(missing_ok=True)
        settings = {"out": str(out), "store": str(store), "workers": self._workers, "gpus": self._gpus}
        with on_signal(partial(ask_to_stop, stop)):
            fit = self._room(packs, out=out, store=store)
            threads = self._threads(fit.packs)
            folders = [str(save_pack(out, pack, threads=threads)) for pack in packs]
            if self._folder is None:
                self._folder = self._open.enter_context(self._backend.ready(out=out, store=store))
            said = self._trained(folders, settings, fit, threads=threads)
        if stop.exists():
            reason = stop.read_text()
            stop.unlink()
            raise Interrupted(f"{reason}; the same command continues")
        reasons: dict[str, str] = {}
        for pack, folder in zip(packs, folders, strict=True):
            reasons |= crashed(pack, said.get(folder, WORKER_DIED), out=out)
        return reasons

    def _room(self, packs: Sequence[Pack], *, out: Path, store: Path) -> ConcurrencyLimit:
        """How many of the packs are trained at once."""
        wanted = ConcurrencyLimit(min(self.slots, len(packs)), int(1 / self._gpus) if 0 < self._gpus < 1 else 1)
        return packs_that_fit(
            packs,
            wanted,
            machine=self._cluster,
            workers=self._workers,
            threads=self._threads(wanted.packs),
            out=out,
            store=store,
            known=self._footprints,
        )

    def _threads(self, packs: int) -> int:
        """Of each worker of so many packs; few share all the cores."""
        return self.threads if packs == self.slots else self._shared_out(packs)

    def _trained(
        self, folders: list[str], settings: Mapping[str, Any], room: ConcurrencyLimit, *, threads: int
    ) -> dict[str, str | None]:
        """What became of each pack: None, or why it crashed; nothing of one whose worker died too often.

        Where a worker dies between two packs, Tune gives up the next one, which had not begun; it gets another turn.
        """
        storage, said, left = Path(mkdtemp(dir=self._folder)), dict[str, str | None](), folders
        for turn in range(DEATHS + 1):
            if not left or (Path(settings["out"]) / STOP).exists():
                break
            said |= self._fit(left, {**settings, "storage": str(storage)}, room, threads=threads, turn=turn)
            left = [folder for folder in left if folder not in said and _starts(storage, folder) <= DEATHS]
        return said

    def _fit(
        self, folders: list[str], settings: Mapping[str, Any], room: ConcurrencyLimit, *, threads: int, turn: int
    ) -> dict[str, str | None]:
        """What became of each pack that Tune did not give up: None, or why it crashed."""
        from ray import tune

        # A pack of several workers waits for its ranks, which hold the resources: `max_concurrent_trials` counts them.
        gpus = max(self._gpus, 1 / room.per_gpu) if self._gpus else 0
        resources = {"cpu": threads, "gpu": gpus} if self._workers == 1 else WAITING
        tuner = tune.Tuner(
            tune.with_resources(train_pack, resources),
            param_space={"pack": tune.grid_search(folders), **settings},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=room.packs),
            run_config=tune.RunConfig(
                name=f"turn{turn}",
                storage_path=settings["storage"],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS),
            ),
        )
        results = while_ray_lives(tuner.fit)
        refuse_disk(results)
        return _outcomes(folders, results)


def refuse_disk(results: Iterable[Any]) -> None:
    """Raise ``DiskFailed`` where the disk refused a pack of Tune's results."""
    if refused := [result.metrics["refused"] for result in results if (result.metrics or {}).get("refused")]:
        raise DiskFailed(refused[0])


def _outcomes(folders: Sequence[str], results: Iterable[Any]) -> dict[str, str | None]:
    """What became of packs, from Tune's results, which are in their order: None, or why it crashed.

    Nothing of one whose worker died.
    """
    said: dict[str, str | None] = {}
    for folder, result in zip(folders, results, strict=False):  # of a study that is stopped some have none
        if result.error is None and result.metrics:
            said[result.metrics["pack"]] = result.metrics["crashed"]
        elif (why := _raised(result.error)) is not None:
            said[folder] = why
    return said


def _raised(error: object) -> str | None:
    """What Python raised in a worker, in one line; None where nothing did: the worker died."""
    from ray.exceptions import RayActorError, RayTaskError

    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(cause, ModisError):
        return str(cause)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {shown(str(cause))}"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"its worker could not begin: {shown(str(error).strip().splitlines()[-1])}"
    return None


def train_pack(config: Mapping[str, Any]) -> dict[str, Any]:
    """One pack in a worker of Ray. Returns the pack, why it crashed, or None, and what the disk refused, or None."""

    os.umask(0o077)
    out = Path(config["out"])
    stop = StopFile(out / STOP)
    _note_start(Path(config["storage"]), config["pack"])
    pack, threads = load_pack(Path(config["pack"]))
    cpu_settings.use(pack.trials[0].run.trainer.threads or threads)
    reason: str | None = None
    refused: str | None = None
    try:
        if stop.requested() is None and config["workers"] == 1:
            reason = attempt(pack, out=out, store=Path(config["store"]), reporter=NullReporter(), stop=stop)
        elif stop.requested() is None:
            reason = _attempt_on_ranks(config, threads)
    except Interrupted:
        pass  # saved; the driver knows
    except DiskFailed as error:
        refused = str(error)
    return {"pack": config["pack"], "crashed": reason, "refused": refused}


def _note_start(storage: Path, pack: str) -> None:
    with (storage / f"starts-{Path(pack).name}").open("ab") as file:
        file.write(b".")


def _starts(storage: Path, pack: str) -> int:
    """How often a pack was begun."""
    noted = storage / f"starts-{Path(pack).name}"
    return noted.stat().st_size if noted.exists() else 0


def _attempt_on_ranks(config: Mapping[str, Any], threads: int) -> str | None:
    """``attempt`` on several ranks, which Ray Train starts."""
    folder = Path(config["storage"]) / "ranks" / Path(config["pack"]).name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return on_ranks(
            _attempt_of_rank,
            config,
            workers=config["workers"],
            threads=threads,
            gpus=config["gpus"],
            folder=folder,
            record=Path(config["pack"]) / RECORD,
        )
    except DiskFailed:
        raise
    except RunFailed as error:
        return str(error)


def _attempt_of_rank(seat: RankSpec, config: Mapping[str, Any]) -> str | None:
    out = Path(config["out"])
    pack, _ = load_pack(Path(config["pack"]))
    stop = StopFile(out / STOP)
    return attempt(pack, out=out, store=Path(config["store"]), reporter=NullReporter(), stop=stop, seat=seat)


def _check(resources: Resources, *, device: str, cluster: Cluster, workers: int) -> None:
    cpus = resources.cpus or workers
    threads = max(1, cpus // workers) if workers > 1 else 1
    problems = workers_mistakes(workers, threads=threads, device=device, cluster=cluster)
    if workers > 1 and cluster.gpus and (resources.gpus or 1.0) != 1.0:
        problems.append("sweep.resources.gpus: with several workers each has one GPU; leave it out")
    if cpus % workers:
        problems.append(f"sweep.resources.cpus: {cpus} cannot be shared out among {workers} workers")
    of_one_node = resources if workers == 1 else resources.model_copy(update={"cpus": None})
    problems += mistakes(of_one_node, cluster=cluster)
    if problems:
        raise ConfigError(problems, source="study")
