"""Training packs one after the other in this process: for debugging, for tests, for a task of a job array."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch

from modis_dist.config.study import Resources
from modis_dist.evaluate.results import read_result
from modis_dist.execution.resources import mistakes, this_machine
from modis_dist.execution.run_pack import Pack, attempt, trial_folder
from modis_dist.runtime.errors import ConfigError, Interrupted
from modis_dist.runtime.signals import Flag, on_signal
from modis_dist.train import cpu_settings
from modis_dist.train.callbacks import NullReporter


class LocalExecutor(AbstractContextManager["LocalExecutor"]):
    """One pack at a time."""

    slots = 1

    def __init__(self, resources: Resources, *, workers: int = 1) -> None:
        problems = mistakes(resources, cluster=this_machine())
        if workers > 1:
            problems.append(f"trainer.workers: {workers} are started by Ray; say sweep.executor: ray")
        if problems:
            raise ConfigError(problems, source="study")
        self.threads = resources.cpus or torch.get_num_threads()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; returns why trials crashed, by id. Raises ``Interrupted`` after a signal, ``DiskFailed``."""
        reasons: dict[str, str] = {}
        flag = Flag()
        with on_signal(flag.set):
            for pack in packs:
                cpu_settings.use(pack.trials[0].run.trainer.threads or self.threads)
                reason = attempt(pack, out=out, store=store, reporter=NullReporter(), stop=flag)
                reasons |= crashed(pack, reason, out=out)
                stopped = flag.requested()
                if stopped:
                    raise Interrupted(f"{stopped}; the same command continues")
        return reasons


def crashed(pack: Pack, reason: str | None, *, out: Path) -> dict[str, str]:
    """The reason for every trial of a crashed pack that has no result."""
    if reason is None:
        return {}
    return {t.id: reason for t in pack.trials if read_result(trial_folder(out, t)) is None}
