"""Job scripts: options of sbatch, the site's setup lines, one command. Pure text.

The command replaces the shell (exec), so that Slurm's signals reach it directly. Paths are quoted; values of a profile
are validated in ``config.cluster``.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.job_status import STARTING
from modis_dist.runtime.version import __version__

Kind = Literal["array", "finish", "allocation"]
LOGS = "logs"
STATUS = "status"
VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def script(site: Site, *, kind: Kind, name: str, out: Path, first: int = 0, indices: Sequence[int] = ()) -> str:
    """Return the script of an array, whose task INDEX trains pack ``first`` + INDEX, or of a single job.

    ``name``: the study. ``out``: the absolute output folder.
    """
    lines = ["#!/bin/bash", f"# Study {name}, {_of_kind(kind, first, indices)}; written by modis-dist {__version__}."]
    nodes = site.nodes if kind == "allocation" else 1
    options = [f"--job-name={name}{'-finish' * (kind == 'finish')}", *requests(site, nodes=nodes)]
    options += [f"--output={LOGS}/{'%A_%a' if kind == 'array' else '%j'}.log", "--open-mode=append", "--requeue"]
    options += [f"--signal=B:USR1@{site.warning_s}"]
    if kind == "array":
        options += [f"--array={ranges(indices)}%{site.array_parallelism}"]
    lines += [f"#SBATCH {option}" for option in options]
    lines += ["umask 077", "trap '' USR1  # until Python handles it", f"touch {_starting_file(kind, first)}"]
    lines += ["set -e", *site.setup]
    if site.scratch is not None:
        scratch = VARIABLE.sub(r"${\1:?not set on this node, used by scratch of the profile}", site.scratch)
        lines += [f'export TMPDIR="{scratch}"', 'mkdir -p "$TMPDIR"']
    else:
        lines += ['[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR  # set by the submitting machine']
    return "\n".join([*lines, f"exec {command(site, kind=kind, out=out, first=first)}", ""])


def options_of(text: str) -> list[str]:
    """Return the options of sbatch in a script."""
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def command(site: Site, *, kind: Kind, out: Path, first: int = 0) -> str:
    """Return the command of a job as a shell command line."""
    words = [*python(site), "-m", "modis_dist", "job", kind, str(out)]
    task = f' "$(({first} + SLURM_ARRAY_TASK_ID))"' if first else ' "$SLURM_ARRAY_TASK_ID"'
    return shlex.join(words) + (task if kind == "array" else "")


def _starting_file(kind: Kind, first: int) -> str:
    """Return the file that exists until Python has started."""
    name = f"pack-$(({first} + SLURM_ARRAY_TASK_ID))" if kind == "array" else kind
    return f'"{STATUS}/{name}{STARTING}"'


def python(site: Site) -> list[str]:
    """Return the command that starts Python in a job."""
    return list(site.python) if site.python is not None else [sys.executable]


def requests(site: Site, *, nodes: int) -> list[str]:
    """Return the options of sbatch for the resources of a job."""
    named = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    options = [f"--{option}={value}" for option, value in named.items() if value is not None]
    options += [f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={site.cpus}"]
    kind = f"{site.gpu_kind}:" if site.gpu_kind else ""
    generic = [f"gpu:{kind}{site.gpus}", *site.gres] if site.gpus else site.gres
    options += [f"--gres={','.join(generic)}"] if generic else []
    options += [f"--mem={site.memory}"] if site.memory else []
    return [*options, f"--time={site.time}", *site.options]


def ranges(indices: Sequence[int]) -> str:
    """Return ascending numbers in the notation of sbatch: ``0-3,7``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _of_kind(kind: Kind, first: int, indices: Sequence[int]) -> str:
    match kind:
        case "array":
            return f"packs {ranges([first + index for index in indices])} of submission/submission.json"
        case "finish":
            return "selection, refit and test"
    return "all trials, selection, refit and test on the nodes of this job"
