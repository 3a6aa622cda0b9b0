"""The scripts that Slurm runs: options of sbatch, the site's own lines, one command. Pure text.

The command takes the place of the shell, so that Slurm's signals reach it directly. Paths stand in single quotes; what
a profile may say is checked where it is read (``config.cluster``).
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.job_notes import BEGUN
from modis_dist.runtime.version import __version__

Kind = Literal["array", "finish", "allocation"]
LOGS = "logs"
STATUS = "status"
VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def script(site: Site, *, kind: Kind, name: str, out: Path, first: int = 0, indices: Sequence[int] = ()) -> str:
    """A job of a submission: tasks of an array with some indices, each ``first`` below its pack's, or a single job.

    ``name`` is that of the study, ``out`` the absolute folder of its results.
    """
    lines = ["#!/bin/bash", f"# Study {name}, {_of_kind(kind, first, indices)}; written by modis-dist {__version__}."]
    options = [f"--job-name={name}{'-finish' * (kind == 'finish')}", *requests(site, nodes=_nodes(site, kind))]
    options += [f"--output={LOGS}/{'%A_%a' if kind == 'array' else '%j'}.log", "--open-mode=append", "--requeue"]
    options += [f"--signal=B:USR1@{site.warning_s}"]
    if kind == "array":
        options += [f"--array={ranges(indices)}%{site.at_once}"]
    lines += [f"#SBATCH {option}" for option in options]
    lines += ["umask 077", "trap '' USR1  # until the program listens", f"touch {_begun(kind, first)}"]
    lines += ["set -e", *site.setup]
    if site.scratch is not None:
        scratch = VARIABLE.sub(r"${\1:?is not set here; scratch of the profile names it}", site.scratch)
        lines += [f'export TMPDIR="{scratch}"', 'mkdir -p "$TMPDIR"']
    else:
        lines += ['[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR  # of the machine that submitted']
    return "\n".join([*lines, f"exec {command(site, kind=kind, out=out, first=first)}", ""])


def command(site: Site, *, kind: Kind, out: Path, first: int = 0) -> str:
    """What a job runs, as a line of shell."""
    words = [*python(site), "-m", "modis_dist", "job", kind, str(out)]
    task = f' "$(({first} + SLURM_ARRAY_TASK_ID))"' if first else ' "$SLURM_ARRAY_TASK_ID"'
    return shlex.join(words) + (task if kind == "array" else "")


def _begun(kind: Kind, first: int) -> str:
    """A file that is there until Python has begun."""
    name = f"pack-$(({first} + SLURM_ARRAY_TASK_ID))" if kind == "array" else kind
    return f'"{STATUS}/{name}{BEGUN}"'


def python(site: Site) -> list[str]:
    """The words that start Python in a job."""
    return list(site.python) if site.python is not None else [sys.executable]


def requests(site: Site, *, nodes: int) -> list[str]:
    """The options of sbatch that say where a job runs and what it gets."""
    named = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    options = [f"--{option}={value}" for option, value in named.items() if value is not None]
    options += [f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={site.cpus}"]
    kind = f"{site.gpu_kind}:" if site.gpu_kind else ""
    generic = [f"gpu:{kind}{site.gpus}", *site.gres] if site.gpus else site.gres
    options += [f"--gres={','.join(generic)}"] if generic else []
    options += [f"--mem={site.memory}"] if site.memory else []
    return [*options, f"--time={site.time}", *site.options]


def ranges(indices: Sequence[int]) -> str:
    """Ascending numbers as sbatch writes them: ``0-3,7``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _nodes(site: Site, kind: Kind) -> int:
    return site.nodes if kind == "allocation" else 1


def _of_kind(kind: Kind, first: int, indices: Sequence[int]) -> str:
    match kind:
        case "array":
            return f"packs {ranges([first + index for index in indices])} of submission/submission.json"
        case "finish":
            return "the choice among its trials, the refit and the test"
    return "from its first trial to its test, on all nodes of the job"
