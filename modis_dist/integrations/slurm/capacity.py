"""Checks of a plan against the jobs of a profile: memory of a pack, memory of a GPU, time to save.

Memory is computed from sizes; nothing is trained here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.execution.memory import Footprint, estimate_footprint
from modis_dist.execution.run_pack import Pack
from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.finding import Finding
from modis_dist.study.plan import Plan

MEMORY, GPU_MEMORY, SAVING = "memory of a pack", "GPU memory of a pack", "time to save"
SMALL_GPU = 13 * 10**9  # usable bytes of a GPU with 16 GB
SAVING_FRACTION = 0.5  # of warning_s; the rest is for the current step and a busy file system
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def check_capacity(planned: Plan, site: Site) -> list[Finding]:
    """Check that the largest pack fits the memory of a job and of a GPU; no findings for a local profile."""
    packs, gpu = planned.packs(), site.gpus > 0 and planned.study.trainer.device != "cpu"
    if site.executor == "local" or not packs:
        return []

    def footprint(pack: Pack) -> Footprint:
        shape = planned.shapes[pack.trials[0].id]
        return estimate_footprint(pack, planned.store, shape, gpu=gpu, limit=memory_of(site))

    largest = max(packs, key=lambda pack: (footprint(pack).host, footprint(pack).gpu))
    size, limit = footprint(largest), memory_of(site)
    stacked = f"for {len(largest.trials)} stacked trials"
    message = f"about {size.host / 1e9:.1f} GB {stacked}"
    if limit is None:
        findings = [Finding(MEMORY, "ok", f"{message}; a job gets the site's default")]
    else:
        fix = "raise memory in the profile" + _fewer_trials(largest, lambda part: footprint(part).host <= limit)
        findings = [Finding.of(MEMORY, f"{message}, a job has {site.memory}", ok=size.host <= limit, fix=fix)]
    if gpu:
        fix = "jobs fail on smaller GPUs: select a larger one with gpu_kind or constraint"
        fix += _fewer_trials(largest, lambda part: footprint(part).gpu <= SMALL_GPU, suffix=" for 16 GB")
        message, fits = f"about {size.gpu / 1e9:.1f} GB {stacked}", size.gpu <= SMALL_GPU
        findings.append(Finding.of(GPU_MEMORY, message, ok=fits, fix=fix, level="warning"))
    return findings


def memory_of(site: Site) -> int | None:
    """Return the memory of a job in bytes; None if the profile does not set it."""
    return int(site.memory[:-1]) * UNITS[site.memory[-1]] if site.memory else None


def refuse_if_too_large(findings: Sequence[Finding], study: Study) -> None:
    """Raise ``ConfigError`` if a pack does not fit the memory of a job."""
    problems = [f"cluster.memory: {finding.message}; {finding.fix}" for finding in findings if finding.level == "error"]
    if problems:
        raise ConfigError(problems, source=study.name)


def check_saving(seconds: float, site: Site) -> Finding:
    """Check that a checkpoint is written between the warning signal and the time limit."""
    warning_s = min(3600, 10 * round(seconds / SAVING_FRACTION / 10 + 1))
    return Finding.of(
        SAVING,
        f"a checkpoint takes about {seconds:.1f} s (measured on this machine), warning_s is {site.warning_s}",
        ok=seconds <= SAVING_FRACTION * site.warning_s,
        fix=f"set warning_s: {warning_s} in the profile, or the time limit may end a job before it has saved",
        level="warning",
    )


def _fewer_trials(pack: Pack, fits: Callable[[Pack], bool], *, suffix: str = "") -> str:
    """Return the largest stack that fits, as advice; empty if not even one trial does."""
    fitting = [n for n in range(1, len(pack.trials)) if fits(replace(pack, trials=pack.trials[:n]))]
    return f", or set sweep.packing.max_trials: {fitting[-1]}{suffix}" if fitting else ""
