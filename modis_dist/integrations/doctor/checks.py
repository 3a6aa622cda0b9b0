"""Checks of `modis-dist doctor` in order, and the all-reduce between processes or nodes.

Changes nothing: test files are written to temporary folders.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.integrations.doctor import machine
from modis_dist.integrations.doctor.all_reduce import LIMIT_S, AllReduceResult, RankResult, read_all_reduce
from modis_dist.integrations.slurm.job_script import requests
from modis_dist.integrations.slurm.slurm_commands import allocated_nodes, check_request, node_names, run_on_nodes
from modis_dist.runtime.finding import Finding
from modis_dist.runtime.text import shown

ALL_REDUCE = "all-reduce"
PREFIX = ".modis-doctor-"
GRACE_S = 5.0  # for processes to end after their time limit


def examine(site: Site | None, *, folder: Path, profile: str = "PROFILE.yaml") -> Iterator[Finding]:
    """Yield each finding as soon as it is known.

    ``folder``: the output folder, existing or not. ``profile``: path of the profile as the user wrote it.
    """
    folder = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    on_slurm = site is not None and site.executor == "slurm"
    yield machine.versions()
    yield from machine.gpus(requested=site.gpus if site is not None and site.python is None else 0)
    yield machine.temporary_space()
    yield from machine.output_folder(folder)
    options = requests(site, nodes=site.nodes) if site is not None else []
    if on_slurm:
        yield check_request(options)
    local = site is not None and site.executor == "local"
    if not local and (nodes := allocated_nodes()):
        yield from over_allocation(list(site.python or ()) if site is not None else [], folder, nodes=nodes)
    elif on_slurm:
        yield not_allocated(options, profile, folder)
    else:
        yield on_this_machine()


def not_allocated(options: Sequence[str], profile: str, folder: Path) -> Finding:
    """Report that nodes were not tested, with the command that tests the nodes of a profile."""
    doctor = ["modis-dist", "doctor", "--cluster", profile, "--out", str(folder)]
    fix = f"run doctor on the nodes: {shlex.join(['salloc', *options, *doctor])}"
    return Finding(ALL_REDUCE, "warning", "not tested: not in a Slurm job; nodes may differ from this machine", fix)


def on_this_machine() -> Finding:
    """Check an all-reduce between two processes over loopback."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder, size = Path(name), 2
        _run(_command([], folder), size)
        return all_reduce_finding(read_all_reduce(folder, size), ["process 1", "process 2"], srun_error="")


def _run(command: Sequence[str], size: int) -> None:
    """Run processes with the variables of Slurm's tasks; kill those that exceed the time limit."""
    shared = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    running = [
        subprocess.Popen(
            command,
            env=shared | {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(size)
    ]
    try:
        for process in running:
            process.wait(LIMIT_S + GRACE_S)
    finally:
        for process in running:
            process.kill()
            process.wait()


def over_allocation(python: Sequence[str], folder: Path, *, nodes: int) -> list[Finding]:
    """Check an all-reduce over all nodes of this job, and a lock between them in ``folder``."""
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as name:
            inside, names = Path(name), node_names(nodes)
            srun_error = run_on_nodes(_command(python, inside), nodes, limit_s=LIMIT_S)
            result = read_all_reduce(inside, nodes)
    except OSError as error:
        fix = "give --out a folder that all nodes see and you may write to"
        return [Finding(ALL_REDUCE, "error", f"{shown(str(folder))}: {error.strerror}", fix)]
    return [all_reduce_finding(result, names, srun_error=srun_error), *locks_between(result, names)]


def locks_between(result: AllReduceResult, names: Sequence[str]) -> list[Finding]:
    """Check that a lock of the first node excludes the others; no finding if none of them could try."""
    tried = {names[rank]: done.excluded for rank, done in result.done.items() if done.excluded is not None}
    if not tried:
        return []
    intruders = [name for name, excluded in tried.items() if not excluded]
    message = (
        f"{_listed(intruders)} acquired a lock held by {names[0]}"
        if intruders
        else f"a lock of {names[0]} excludes {_listed([*tried])}"
    )
    fix = (
        "two jobs could overwrite each other's results: use another folder, or mount it with locks that hold between "
        "nodes (Lustre: -o flock, not localflock; NFS: lock)"
    )
    return [Finding.of("locks between nodes", message, ok=not intruders, fix=fix)]


def _command(python: Sequence[str], folder: Path) -> list[str]:
    return [*(python or [sys.executable]), "-m", "modis_dist", "job", "all-reduce", str(folder)]


def all_reduce_finding(result: AllReduceResult, names: Sequence[str], *, srun_error: str) -> Finding:
    """Report the result of an all-reduce; ``names``: process names; ``srun_error``: error of srun."""
    absent = [name for rank, name in enumerate(names) if rank not in result.started]
    if absent:
        fix = (
            "check that these nodes are up, see this folder under the same path, and can start this Python (with a "
            "slow file system, try again)"
        )
        reason = f": {srun_error}" if srun_error else f" within {LIMIT_S} s"
        return Finding(ALL_REDUCE, "error", f"{_listed(absent)} did not start{reason}", fix)
    failed = {rank: done.error for rank, done in result.done.items() if done.error}
    silent = [name for rank, name in enumerate(names) if rank not in result.done]
    if failed or silent:
        return _not_connected(failed, silent, names)
    return Finding(ALL_REDUCE, "ok", _times(result.done, names))


def _not_connected(failed: Mapping[int, str], silent: Sequence[str], names: Sequence[str]) -> Finding:
    parts = [f"{names[rank]}: {shown(error)}" for rank, error in failed.items()]
    parts += [f"{_listed(silent)} started and did not finish within {LIMIT_S} s"] if silent else []
    fix = (
        "processes start but do not connect: check that nodes may connect to each other on any port, and that their "
        "host names resolve to addresses of the network between them (`getent hosts NODE`), not to 127.0.0.1"
    )
    return Finding(ALL_REDUCE, "error", "; ".join(parts), fix)


def _times(done: Mapping[int, RankResult], names: Sequence[str]) -> str:
    message = f"4 MB over {', '.join(names)} in {max(rank.gloo_s for rank in done.values()):.3f} s (gloo)"
    nccl = [rank.nccl_s for rank in done.values() if rank.nccl_s is not None]
    return f"{message}, {max(nccl):.4f} s (NCCL)" if len(nccl) == len(done) else message


def _listed(names: Sequence[str]) -> str:
    return shown(", ".join(names))
