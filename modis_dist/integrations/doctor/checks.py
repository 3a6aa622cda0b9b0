"""Whether this machine, and the cluster of a site profile, can do what we ask of them; each finding with what to do.

Changes nothing: what it tries, it tries in folders of its own that are gone afterwards.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.integrations.doctor import machine as doctor_machine
from modis_dist.integrations.doctor.all_reduce import LIMIT_S, Answers, Done, answers
from modis_dist.integrations.slurm import checks as doctor_slurm
from modis_dist.integrations.slurm.slurm_commands import ask, one_line
from modis_dist.runtime.finding import Finding, judged
from modis_dist.runtime.text import shown

WHAT = "all-reduce"
PREFIX = ".modis-doctor-"
LATE_S = 5.0  # for processes that are past their limit to end
MEGABYTES = 4


def examine(
    site: Site | None, *, requests: Sequence[str], folder: Path, profile: str = "PROFILE.yaml"
) -> Iterator[Finding]:
    """All findings, each as soon as it is known.

    ``requests`` are the options that the profile gives to sbatch, results are to go to ``folder``, which need not be
    there yet, and ``profile`` is what the user calls it.
    """
    folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    on_slurm = site is not None and site.executor == "slurm"
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if in_allocation() else 1
    yield doctor_machine.versions()
    yield doctor_machine.processors()
    yield doctor_machine.bf16_of_cpu()
    yield from doctor_machine.gpus(wanted=site.gpus if site is not None and site.python is None else 0)
    yield doctor_machine.loopback()
    yield doctor_machine.host_name(nodes=allocated)
    yield from doctor_machine.temporary_folder(scratch=site.scratch if site is not None else None)
    yield from doctor_machine.folder_of_runs(folder)
    if on_slurm or (site is None and shutil.which("sbatch") is not None):
        yield from doctor_slurm.cluster(site, requests=requests)
    local = site is not None and site.executor == "local"
    if in_allocation() and not local and shutil.which("srun") is not None:
        yield from over_allocation(list(site.python or ()) if site is not None else [], folder, nodes=allocated)
    elif on_slurm:
        yield not_allocated(requests, profile, folder)
    else:
        yield on_this_machine()


def in_allocation() -> bool:
    """Whether this process is in a job of Slurm."""
    return "SLURM_JOB_ID" in os.environ


def not_allocated(requests: Sequence[str], profile: str, folder: Path) -> Finding:
    """How to have the nodes of a profile looked at, and talk to each other, which takes an allocation."""
    own = ["modis-dist", "doctor", "--cluster", profile, "--out", str(folder)]
    command = shlex.join(["salloc", *requests, *own])
    found = "not tried: this is not in an allocation; what is said of this machine may be otherwise on its nodes"
    return Finding(WHAT, "warning", found, f"have a node say the same of itself: {command}")


def on_this_machine() -> Finding:
    """Two processes of this machine talk over loopback."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder, size = Path(name), 2
        with _started(_command([], folder), size):
            pass
        return told(answers(folder, size), ["process 1", "process 2"], said="")


@contextmanager
def _started(command: Sequence[str], size: int) -> Iterator[None]:
    """So many processes, numbered as by Slurm; they have ended after the block."""
    shared = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    numbered = ({"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size)} for rank in range(size))
    running = [
        subprocess.Popen(command, env=shared | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for own in numbered
    ]
    try:
        yield
        for process in running:
            process.wait(LIMIT_S + LATE_S)
    finally:
        for process in running:
            process.kill()
            process.wait()


def over_allocation(python: Sequence[str], folder: Path, *, nodes: int) -> list[Finding]:
    """All nodes of the job that this process is in talk to each other over the network, and lock a file in a folder."""
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as name:
            inside, names = Path(name), _names(nodes)
            said = _srun(_command(python, inside), nodes)
            found = answers(inside, nodes)
    except OSError as error:
        advice = "give --out a folder that all nodes see and you may write to"
        return [Finding(WHAT, "bad", f"{shown(str(folder))}: {error.strerror}", advice)]
    return [told(found, names, said=said), *locks_between(found, names)]


def locks_between(found: Answers, names: Sequence[str]) -> list[Finding]:
    """Whether a lock that the first node holds keeps the others out; nothing where none of them could try."""
    tried = {names[rank]: done.kept_out for rank, done in found.done.items() if done.kept_out is not None}
    if not tried:
        return []
    inside = [name for name, kept_out in tried.items() if not kept_out]
    said = (
        f"{_listed(inside)} got a lock that {names[0]} held"
        if inside
        else f"{_listed([*tried])} kept out by {names[0]}"
    )
    advice = (
        "two jobs could write to the same results: use another folder, or have it mounted with locks that hold between "
        "nodes (Lustre: -o flock, not localflock; NFS: lock)"
    )
    return [judged("locks between nodes", said, unless=not inside, advice=advice)]


def _command(python: Sequence[str], folder: Path) -> list[str]:
    return [*(python or [sys.executable]), "-m", "modis_dist", "job", "all-reduce", str(folder)]


def _srun(command: Sequence[str], nodes: int) -> str:
    """Run a command once on each node; returns what srun complained of, if it ended by itself."""
    spread = ["--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--input=none"]
    with subprocess.Popen(
        ["srun", *spread, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as step:
        try:
            said = step.communicate(timeout=LIMIT_S)[1]
            return one_line(said, "srun") if step.returncode else ""
        except subprocess.TimeoutExpired:
            step.terminate()
            with suppress(subprocess.TimeoutExpired):
                step.communicate(timeout=LATE_S)
            return ""
        finally:
            step.kill()


def _names(nodes: int) -> list[str]:
    """The nodes of this job as Slurm calls them, in the order of their tasks."""
    found = ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")).text.split()
    return found if len(found) == nodes else [f"node {number}" for number in range(1, nodes + 1)]


def told(found: Answers, names: Sequence[str], *, said: str) -> Finding:
    """What the processes on some nodes, one each, and srun have said."""
    absent = [name for rank, name in enumerate(names) if rank not in found.came]
    if absent:
        advice = (
            "see that these nodes are up, see this folder under the same path, and start this Python (where the file "
            "system is slow, a second try may do)"
        )
        why = f": {said}" if said else f" within {LIMIT_S} s"
        return Finding(WHAT, "bad", f"{_listed(absent)} did not come{why}", advice)
    failed = {rank: done.error for rank, done in found.done.items() if done.error}
    silent = [name for rank, name in enumerate(names) if rank not in found.done]
    if failed or silent:
        return _apart(failed, silent, names)
    return Finding(WHAT, "good", _pace(found.done, names))


def _apart(failed: Mapping[int, str], silent: Sequence[str], names: Sequence[str]) -> Finding:
    """Of processes that came, and did not find each other."""
    parts = [f"{names[rank]}: {shown(error)}" for rank, error in failed.items()]
    parts += [f"{_listed(silent)} came, and did not finish within {LIMIT_S} s"] if silent else []
    advice = (
        "processes start but do not reach each other: see that nodes may connect to each other at any port, and that "
        "their names lead to addresses of the network between them (`host name` above)"
    )
    return Finding(WHAT, "bad", "; ".join(parts), advice)


def _pace(done: Mapping[int, Done], names: Sequence[str]) -> str:
    """How long it took on the slowest."""
    gloo, nccl = max(one.gloo_s for one in done.values()), [one.nccl_s for one in done.values()]
    found = f"{MEGABYTES} MB over {', '.join(names)} in {gloo:.3f} s (gloo)"
    own = [seconds for seconds in nccl if seconds is not None]
    return f"{found}, {max(own):.4f} s (NCCL)" if len(own) == len(nccl) else found


def _listed(names: Sequence[str]) -> str:
    return shown(", ".join(names))
