"""Start the ranks of one training with Ray Train and restart all of them when one dies.

Ray places and monitors the ranks. Rendezvous, computation and checkpoints do not use Ray, which passes on only the
result of a training.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from modis_dist.config.run import Run
from modis_dist.evaluate.results import Result
from modis_dist.execution.resources import worker_mistakes
from modis_dist.integrations.ray.head_watch import while_ray_lives
from modis_dist.integrations.ray.private_cluster import RayBackend
from modis_dist.runtime.errors import (
    ConfigError,
    Interrupted,
    MachineFailed,
    NodeFailed,
    RankLost,
    RunFailed,
    UserError,
)
from modis_dist.runtime.file_watch import watching
from modis_dist.runtime.lock import LOCK, locked
from modis_dist.runtime.signals import Flag, StopFile, on_signal
from modis_dist.runtime.text import shown
from modis_dist.train.callbacks import NullReporter, Reporter
from modis_dist.train.journal import JOURNAL, JournalReader, report_epochs
from modis_dist.train.process_group import RankSpec, rendezvous_file, rendezvous_port

T = TypeVar("T")
RESTARTS = 2  # of all ranks, after the death of one
STOP = "stop"
RESTART_LOG = "ranks.log"  # in the folder of a training: which ranks were lost, and when
UNUSED_CALLBACKS = (  # Ray Train starts an actor for each
    "PlacementGroupCleanerCallback",  # outlives its driver and polls a dashboard; placement groups end with the driver
    "DatasetsCallback",  # takes a second of a core; no Ray dataset is used
)


def on_ranks(
    work: Callable[[RankSpec, Mapping[str, Any]], T],
    settings: Mapping[str, Any],
    *,
    workers: int,
    threads: int,
    gpus: float,
    folder: Path,
    restart_log: Path,
) -> T:
    """Call ``work(spec, settings)`` on every rank in workers of the running Ray; return the result of rank 0.

    When a rank dies or its GPU fails, all ranks restart, and ``work`` resumes from its checkpoint. ``folder`` is
    private and visible to all ranks; ``restart_log`` gets a line per restart. Raises the ``ModisError`` of ``work``;
    after too many restarts ``MachineFailed`` if a GPU failed, else ``RunFailed``.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = {"work": work, "settings": dict(settings), "folder": str(folder), "restart_log": str(restart_log)}
    resources = {"CPU": threads, **({"GPU": gpus} if gpus else {})}
    trainer = _trainer(
        config,
        ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources),
        RunConfig(
            name=secrets.token_hex(8), storage_path=str(folder), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _last_failure(error) from None
    if outcome["error"] is not None:
        raise outcome["error"]
    value: T = outcome["value"]
    return value


def _trainer(config: Mapping[str, Any], scaling: Any, run: Any) -> Any:
    """Return Ray's trainer of ``_rank`` without its process group and its unused actors."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class NoProcessGroup(TorchConfig):  # type: ignore[misc]
        """Ray's own process group would listen on a port that is open to every machine."""

        @property
        def backend_cls(self) -> Any:
            return Backend

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """A trainer without ``UNUSED_CALLBACKS``."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in UNUSED_CALLBACKS]

    return Trainer(
        _rank,
        train_loop_config=config,
        torch_config=NoProcessGroup(),
        scaling_config=scaling,
        run_config=run,
    )


def _rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one rank. Errors that a restart does not fix are returned, not raised."""
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    os.umask(0o077)
    context = get_context()
    name, port = broadcast_from_rank_zero((secrets.token_hex(8), _port(context)))  # new after every restart
    parent, restart_log = Path(config["folder"]) / "rendezvous", Path(config["restart_log"])
    rendezvous = parent / name
    rendezvous.mkdir(mode=0o700, parents=True, exist_ok=True)
    spec = RankSpec(context.get_world_rank(), context.get_world_size(), port or rendezvous_file(rendezvous))
    if spec.rank == 0:
        for earlier in parent.iterdir():
            if earlier != rendezvous:  # Ray may have noticed a death before the other ranks did
                _log_restart("a rank died (killed by the user, or out of memory?)", earlier, restart_log)
    try:
        return {"value": config["work"](spec, config["settings"]), "error": None}
    except (RankLost, NodeFailed) as error:
        _log_restart(str(error), rendezvous, restart_log)
        raise
    except (UserError, Interrupted, RunFailed) as error:
        return {"value": None, "error": error}


def _port(context: Any) -> str | None:
    """Return the rendezvous address of this rank for ranks on other nodes; None if all ranks are on this node."""
    from ray.util import get_node_ip_address

    one_node = context.get_local_world_size() == context.get_world_size()
    return None if one_node else rendezvous_port(get_node_ip_address())


def _log_restart(reason: str, rendezvous: Path, restart_log: Path) -> None:
    """Log why the ranks restart, once per rendezvous."""
    with suppress(FileExistsError):
        (rendezvous / "lost").touch(exist_ok=False)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}; all ranks restart from the last checkpoint\n"
        with restart_log.open("a") as file:
            file.write(line)


def _last_failure(error: Any) -> RunFailed:
    """Return the last failure with its cause as one line: ``MachineFailed`` if a GPU failed, else ``RunFailed``."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "cause", failure) for failure in failures.values()]
    by_kind = [[cause for cause in causes if isinstance(cause, kind)] for kind in (NodeFailed, RankLost, Exception)]
    cause = next((found[0] for found in by_kind if found), error)
    reason = shown(str(cause).strip().splitlines()[-1])
    message = f"after {RESTARTS} restarts: {reason}; rerun the same command to resume from the last checkpoint"
    return MachineFailed(message) if isinstance(cause, NodeFailed) else RunFailed(message)


def train_run_on_ranks(run: Run, *, out: Path, source: str, reporter: Reporter, backend: RayBackend) -> Result:
    """Call ``train_run`` on ``trainer.workers`` ranks; return its result and raise its errors."""
    from modis_dist.config.parse import to_tree
    from modis_dist.data.open_store import open_store

    workers, device = run.trainer.workers, run.trainer.device
    cluster = backend.cluster.without_gpus() if device == "cpu" else backend.cluster
    problems = worker_mistakes(workers, threads=run.trainer.threads or 1, device=device, cluster=cluster)
    if problems:
        raise ConfigError(problems, source=source)
    if (out / LOCK).exists():
        with locked(out, patience_s=0):
            pass  # raises if another process trains here, before Ray starts
    gpus = min(1, cluster.gpus)
    threads = run.trainer.threads or cluster.threads(workers=workers, gpus=gpus)
    store = open_store(run.data, out=out, source=source)  # simulated once, not by every rank
    settings = {"run": to_tree(run), "out": str(out), "source": source, "threads": threads}
    flag = Flag()
    with on_signal(flag.set), backend.ready(out=out, store=store.path) as folder:
        stop = folder / STOP
        training = partial(
            on_ranks,
            _train_run_on_rank,
            settings | {"stop": str(stop)},
            workers=workers,
            threads=threads,
            gpus=gpus,
            folder=folder,
            restart_log=out / RESTART_LOG,
        )
        watcher = _Watcher(out, run.optim.epochs, reporter)
        with on_signal(stop.write_text), watching(watcher.poll):
            if reason := flag.requested():  # while Ray was starting
                raise Interrupted(f"{reason}; nothing was trained; rerun the same command")
            result: Result | None = while_ray_lives(training)
    assert result is not None, "rank 0 has the result"
    return result


def _train_run_on_rank(spec: RankSpec, settings: Mapping[str, Any]) -> Result | None:
    from modis_dist.config.parse import build
    from modis_dist.execution.single import train_run

    return train_run(
        build(Run, settings["run"], source=settings["source"]),
        out=Path(settings["out"]),
        source=settings["source"],
        reporter=NullReporter(),
        stop=StopFile(Path(settings["stop"])),
        threads=settings["threads"],
        spec=spec,
    )


class _Watcher:
    """Reports the epochs of a training on ranks and logs its restarts."""

    def __init__(self, out: Path, epochs: int, reporter: Reporter) -> None:
        self._reader, self._reporter, self._epochs = JournalReader(out / JOURNAL), reporter, epochs
        self._restart_log = out / RESTART_LOG
        self._logged = len(self._restarts())

    def poll(self) -> None:
        report_epochs(self._reader.new(), self._reporter, epochs=self._epochs)
        for line in self._restarts()[self._logged :]:
            logging.getLogger(__name__).warning("%s", line)
            self._logged += 1

    def _restarts(self) -> list[str]:
        return self._restart_log.read_text().splitlines() if self._restart_log.exists() else []
