"""An executor that trains packs one after the other in this process: for debugging, tests and Slurm array tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from modis_dist.config.study import Resources
from modis_dist.execution.resources import resource_mistakes, this_machine
from modis_dist.execution.run_pack import Pack, crash_reasons, try_pack
from modis_dist.runtime.errors import ConfigError, Interrupted
from modis_dist.runtime.signals import Flag, on_signal


class LocalExecutor:
    """Executor that trains one pack at a time."""

    slots = 1

    def __init__(self, resources: Resources, *, workers: int = 1) -> None:
        problems = resource_mistakes(resources, cluster=this_machine())
        if workers > 1:
            problems.append(f"trainer.workers: {workers} workers need Ray; set sweep.executor: ray")
        if problems:
            raise ConfigError(problems, source="study")
        self.threads = resources.cpus or torch.get_num_threads()

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; return crash reasons by trial id.

        Raises ``Interrupted`` after a signal, ``DiskFailed``, and ``NodeFailed`` if a GPU failed.
        """
        reasons: dict[str, str] = {}
        flag = Flag()
        with on_signal(flag.set):
            for pack in packs:
                reason = try_pack(pack, out=out, store=store, stop=flag, threads=self.threads)
                reasons |= crash_reasons(pack, reason, out=out)
                if stopped := flag.requested():
                    raise Interrupted(f"{stopped}; rerun the same command to resume")
        return reasons
