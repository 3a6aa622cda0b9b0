"""Whether the nodes of a profile have room for the packs of a study: memory, a GPU's memory, time to save.

Counted from sizes, not measured: nothing is trained here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.execution.memory import Footprint, on_gpu, on_processor
from modis_dist.execution.run_pack import Pack
from modis_dist.integrations.slurm.checks import megabytes
from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.finding import Finding, judged
from modis_dist.study.plan import Plan

MEMORY = "memory of a pack"
SMALL_GPU = 13 * 10**9  # bytes that a GPU of 16 GB has for a pack
SHARE_OF_WARNING = 0.5  # the other half is for the step that runs, and for a busy file system


def room(planned: Plan, site: Site) -> list[Finding]:
    """Whether the largest pack fits a job's memory, and what it takes of a GPU; nothing for a local profile."""
    packs, gpu = planned.packs(), site.gpus > 0 and planned.study.trainer.device != "cpu"
    if site.executor == "local" or not packs:
        return []
    count = on_gpu if gpu else on_processor

    def takes(pack: Pack) -> Footprint:
        return count(pack, planned.store, planned.shapes[pack.trials[0].id], limit=memory_of(site))

    largest = max(packs, key=lambda pack: (takes(pack).host, takes(pack).gpu))
    return [_of_node(largest, takes, site), *([_of_gpu(largest, takes)] if gpu else [])]


def memory_of(site: Site) -> int | None:
    """Bytes that a job may have on a node; None where the profile does not say."""
    return megabytes(site.memory) * 2**20 or None


def refuse_if_too_large(findings: Sequence[Finding], study: Study) -> None:
    """Raise ``ConfigError`` where a pack does not fit a job's memory."""
    problems = [f"cluster.memory: {one.found}; {one.advice}" for one in findings if one.level == "bad"]
    if problems:
        raise ConfigError(problems, source=study.name)


def saving(seconds: float, site: Site) -> Finding:
    """Whether a checkpoint that takes so long is written between the warning and the time limit."""
    found = f"a checkpoint takes about {seconds:.1f} s (measured here), warning_s is {site.warning_s}"
    enough = seconds <= SHARE_OF_WARNING * site.warning_s
    advice = f"set warning_s: {min(3600, 10 * round(seconds / SHARE_OF_WARNING / 10 + 1))} in the profile, or a job "
    advice += "may be ended at its time limit before it has saved"
    return judged("saving", found, unless=enough, advice=advice, level="warning")


def _of_node(pack: Pack, takes: Callable[[Pack], Footprint], site: Site) -> Finding:
    needed, trials = takes(pack).host, len(pack.trials)
    found = f"about {needed / 1e9:.1f} GB, {trials} trial(s) stacked"
    if site.memory is None:
        return Finding(MEMORY, "good", f"{found}; a job gets what the site gives by default")
    held = megabytes(site.memory) * 2**20
    advice = "raise memory in the profile" + _fewer(pack, lambda one: takes(one).host <= held)
    return judged(MEMORY, f"{found}, a job has {site.memory}", unless=needed <= held, advice=advice)


def _of_gpu(pack: Pack, takes: Callable[[Pack], Footprint]) -> Finding:
    needed = takes(pack).gpu
    found = f"a pack takes about {needed / 1e9:.1f} GB of its GPU, {len(pack.trials)} trial(s) stacked"
    advice = "where a GPU has less, its jobs crash: name a larger one by gpu_kind or constraint"
    advice += _fewer(pack, lambda one: takes(one).gpu <= SMALL_GPU, where=" for 16 GB")
    return judged("memory of a GPU", found, unless=needed <= SMALL_GPU, advice=advice, level="warning")


def _fewer(pack: Pack, fits: Callable[[Pack], bool], *, where: str = "") -> str:
    """With how many trials it would fit, as advice; empty where even one does not."""
    fitting = [n for n in range(1, len(pack.trials)) if fits(replace(pack, trials=pack.trials[:n]))]
    return f", or set sweep.packing.max_trials: {fitting[-1]}{where}" if fitting else ""
