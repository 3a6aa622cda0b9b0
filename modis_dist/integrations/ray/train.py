"""Ray Train as the starter of ranks: one training spread over several processes, started again where one dies.

Ray places the ranks and watches them. How they meet, what they compute and what they save is ours: nothing of a
training passes through Ray but its outcome.
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
from modis_dist.execution.resources import workers_mistakes
from modis_dist.integrations.ray.head_watch import while_ray_lives
from modis_dist.integrations.ray.private_cluster import RayBackend
from modis_dist.runtime.errors import ConfigError, Interrupted, RankLost, RunFailed, UserError, shown
from modis_dist.runtime.file_watch import watching
from modis_dist.runtime.lock import LOCK, locked
from modis_dist.runtime.signals import Flag, StopFile, on_signal
from modis_dist.train import cpu_settings
from modis_dist.train.callbacks import NullReporter, Reporter
from modis_dist.train.journal import JournalReader
from modis_dist.train.process_group import RankSpec, rendezvous_file, rendezvous_port

T = TypeVar("T")
RESTARTS = 2  # of all ranks, after the death of one
STOP = "stop"
NEEDLESS = (  # of what Ray Train starts an actor for
    "PlacementGroupCleanerCallback",  # outlives its driver, asking a dashboard; what it removes ends with the driver
    "DatasetsCallback",  # takes a second of a core; there are no datasets of Ray's
)
RECORD = "ranks.log"  # in the folder of a training: which ranks were lost, and when


def on_ranks(
    work: Callable[[RankSpec, Mapping[str, Any]], T],
    settings: Mapping[str, Any],
    *,
    workers: int,
    threads: int,
    gpus: float,
    folder: Path,
    record: Path,
) -> T:
    """``work(seat, settings)`` on every rank, in processes of a Ray that runs already; what it returns on the first.

    After a death all ranks start again; ``work`` continues from its checkpoint. ``folder`` is private and shared by the
    ranks; ``record`` gets a line for every death. Raises what ``work`` refuses, and ``RunFailed`` where ranks died too
    often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = {
        "work": work,
        "settings": dict(settings),
        "folder": str(folder),
        "record": str(record),
        "threads": threads,
    }
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
        raise RunFailed(_why(error)) from None
    if outcome["refused"] is not None:
        raise outcome["refused"]
    value: T = outcome["value"]
    return value


def _trainer(config: Mapping[str, Any], scaling: Any, run: Any) -> Any:
    """Ray's trainer of ``_rank`` without what nobody here needs."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class MeetingByThemselves(TorchConfig):  # type: ignore[misc]
        """Ray would have them meet at a port that is open to every machine."""

        @property
        def backend_cls(self) -> Any:
            return Backend

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without the actors that nobody here needs."""

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [one for one in made if type(one).__name__ not in NEEDLESS]

    return Trainer(
        _rank,
        train_loop_config=config,
        torch_config=MeetingByThemselves(),
        scaling_config=scaling,
        run_config=run,
    )


def _rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """One rank. What a user must mend is handed back, for starting again would not help."""
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    os.umask(0o077)
    cpu_settings.use(config["threads"])
    context = get_context()
    name, port = broadcast_from_rank_zero((secrets.token_hex(8), _port(context)))  # a new one after every death
    meetings, record = Path(config["folder"]) / "meetings", Path(config["record"])
    meeting = meetings / name
    meeting.mkdir(mode=0o700, parents=True, exist_ok=True)
    seat = RankSpec(context.get_world_rank(), context.get_world_size(), port or rendezvous_file(meeting))
    if seat.rank == 0:
        for earlier in meetings.iterdir():
            if earlier != meeting:  # Ray may have seen a death before the other ranks did
                _note("a rank died; was it killed, by the user or for want of memory?", earlier, record)
    try:
        return {"value": config["work"](seat, config["settings"]), "refused": None}
    except RankLost as error:
        _note(str(error), meeting, record)
        raise
    except (UserError, Interrupted, RunFailed) as error:
        return {"value": None, "refused": error}


def _port(context: Any) -> str | None:
    """Where this rank can be met by those on other nodes; None where there are none."""
    from ray.util import get_node_ip_address

    alone = context.get_local_world_size() == context.get_world_size()
    return None if alone else rendezvous_port(get_node_ip_address())


def _note(why: str, meeting: Path, record: Path) -> None:
    """Keep why ranks start again; of those that noticed the first one writes."""
    with suppress(FileExistsError):
        (meeting / "lost").touch(exist_ok=False)
        with record.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}; all ranks start again from the last checkpoint\n")


def _why(error: Any) -> str:
    """Why the ranks gave up, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    said = [str(getattr(failure, "cause", failure)) for failure in failures.values()]
    lost = next((text for text in said if "rank " in text and " of " in text), None)
    text = (lost or (said[0] if said else str(error))).strip().splitlines()[-1]
    return f"after {RESTARTS} restarts: {shown(text)}; the same command continues from the last checkpoint"


def train_run_on_ranks(run: Run, *, out: Path, source: str, reporter: Reporter, backend: RayBackend) -> Result:
    """``train_run`` on as many workers as the run asks for; returns its result.

    Raises what ``train_run`` raises.
    """
    from modis_dist.config.parse import to_tree
    from modis_dist.data.store.open_store import open_store

    workers, device = run.trainer.workers, run.trainer.device
    cluster = backend.cluster.without_gpus() if device == "cpu" else backend.cluster
    problems = workers_mistakes(workers, threads=run.trainer.threads or 1, device=device, cluster=cluster)
    if problems:
        raise ConfigError(problems, source=source)
    if (out / LOCK).exists():
        with locked(out, patience_s=0):
            pass  # or it says who trains here, before Ray starts
    gpus = min(1, cluster.gpus)
    threads = run.trainer.threads or cluster.threads(workers=workers, gpus=gpus)
    store = open_store(run.data, out=out, source=source)  # simulated once, not by every rank
    settings = {"run": to_tree(run), "out": str(out), "source": source}
    asked = Flag()
    with on_signal(asked.set), backend.ready(out=out, store=store.path) as folder:
        stop = folder / STOP
        training = partial(
            on_ranks,
            _run_of_rank,
            settings | {"stop": str(stop)},
            workers=workers,
            threads=threads,
            gpus=gpus,
            folder=folder,
            record=out / RECORD,
        )
        with on_signal(partial(ask_to_stop, stop)), watching(_Told(out, run.optim.epochs, reporter).look):
            if asked.requested():  # while Ray was started
                raise Interrupted(f"{asked.requested()}; nothing was trained; the same command starts again")
            result: Result | None = while_ray_lives(training)
    assert result is not None, "the first rank has the result"
    return result


def ask_to_stop(file: Path, reason: str) -> None:
    """Make the file that every rank and worker looks for."""
    file.write_text(reason)


def _run_of_rank(seat: RankSpec, settings: Mapping[str, Any]) -> Result | None:
    from modis_dist.config.parse import build
    from modis_dist.execution.single import train_run

    run = build(Run, settings["run"], source=settings["source"])
    return train_run(
        run,
        out=Path(settings["out"]),
        source=settings["source"],
        reporter=NullReporter(),
        stop=StopFile(Path(settings["stop"])),
        seat=seat,
    )


class _Told:
    """Tells a reporter what a training in other processes writes to its journal, and the user of deaths."""

    def __init__(self, out: Path, epochs: int, reporter: Reporter) -> None:
        self._reader = JournalReader(out / "journal.jsonl")
        self._record = out / RECORD
        self._told = len(self._deaths())
        self._epochs = epochs
        self._reporter = reporter

    def look(self) -> None:
        """Read what is new, and tell it."""
        for record in self._reader.new():
            if record["kind"] == "metrics":
                self._reporter.progress(epoch=record["step"], epochs=self._epochs, active=1, headline=record["values"])
        for line in self._deaths()[self._told :]:
            logging.getLogger(__name__).warning("%s", line)
            self._told += 1

    def _deaths(self) -> list[str]:
        return self._record.read_text().splitlines() if self._record.exists() else []
