"""Fake Slurm commands: small programs on PATH that share one state file. They run no job."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun", "sinfo")
SACCT = "JobID|State|NodeList"

SHIM = r"""
import fcntl, json, os, re, sys
from pathlib import Path

path = Path(sys.argv[0]).resolve().parent.parent / "state.json"
OF_JOBS = ("SBATCH_", "SLURM_", "SRUN_", "SALLOC_")
program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
file = path.open("r+")
fcntl.flock(file, fcntl.LOCK_EX)
state = json.load(file)
state["calls"].append([program, *arguments])
after = dict(zip(arguments, arguments[1:]))


def leave(code=0, say="", error=""):
    file.seek(0)
    file.truncate()
    json.dump(state, file)
    file.close()
    print(error, end="", file=sys.stderr)
    print(say, end="")
    sys.exit(code)


def sbatch():
    environment = sorted(name for name in os.environ if name.startswith(OF_JOBS))
    if "--test-only" in arguments:
        state["tested"].append(environment)
        if state["refuses"]:
            leave(1, error=state["refuses"])
        to_come = "sbatch: Job 7 to start at 2026-01-01T00:00:00 using 10 processors on nodes n1 in partition gpu\n"
        leave(error=to_come)
    options = dict(a[2:].partition("=")[::2] for a in arguments[:-1])
    text = Path(arguments[-1]).read_text()
    array = re.search(r"^#SBATCH --array=([^%\n]*)", text, re.MULTILINE)
    tasks = []
    for part in array[1].split(",") if array else ():
        low, _, high = part.partition("-")
        tasks += range(int(low), int(high or low) + 1)
    fault = (state["sbatch"] or [None]).pop(0)
    if isinstance(fault, str) and not fault.startswith("+"):
        leave(1, error=fault)
    number = str(state["next"])
    state["next"] += 1
    waits = {"state": "PENDING", "reason": "Priority", "nodes": ""}
    state["jobs"][number] = {**waits, "tasks": tasks, **options, "text": text,
                             "environment": environment}
    if fault:
        leave(1, error=fault[1:])
    leave(say=f"Submitted batch job {number}\n")


def squeue():
    if state["squeue"] is not None:
        leave(1, error=state["squeue"])
    wanted, lines = after.get("-j"), []
    for number, job in state["jobs"].items():
        whole = not job["tasks"] or (job["state"] == "PENDING" and "-r" not in arguments)
        for name in [number] if whole else [f"{number}_{task}" for task in job["tasks"]]:
            fields = {"%i": name, "%F": number, "%T": job["state"], "%r": job["reason"], "%N": job["nodes"],
                      "%k": job["comment"], "%D": "1", "%P": "low", "%x": job.get("avoids", "")}
            if wanted is None or wanted in (number, name):
                lines.append(re.sub("%[iFTrNkDPx]", lambda found: fields[found[0]], after["-o"]))
    leave(say="".join(f"{line}\n" for line in lines))


def sacct():
    if isinstance(state["sacct"], list):
        leave(say="".join(f"{line}\n" for line in state["sacct"]))
    leave(1, error=state["sacct"])


def scancel():
    for number in arguments:
        state["jobs"].pop(number, None)
    leave()


def sinfo():
    leave(say="".join(f"{line}\n" for line in state["nodes"]))


def scontrol():
    leave()


def srun():
    leave()


globals()[program]()
"""


class FakeSlurm:
    """A queue in a folder; the methods read and change the state of its programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self.bin = folder / "state.json", folder / "bin"
        self.bin.mkdir(parents=True)
        for program in PROGRAMS:
            shim = self.bin / program
            shim.write_text(f"#!{sys.executable} -IS\n{SHIM}")
            shim.chmod(0o700)
        empty: dict[str, Any] = {"next": 1000, "jobs": {}, "calls": [], "sbatch": [], "squeue": None}
        cluster: dict[str, Any] = {"nodes": ["2"], "refuses": "", "tested": []}
        self._write(empty | cluster | {"sacct": [SACCT]})
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")

    def set_answers(self, **answers: Any) -> None:
        """Set the answers of programs.

        ``sbatch``: a list of errors, one per call, with a + if the job is accepted nevertheless. ``squeue``: its error.
        ``sacct``: its lines or its error. ``refuses``: the error of ``sbatch --test-only``. ``nodes``: lines of sinfo.
        """
        self._write(self._read() | answers)

    def put(self, number: str, state: str, *, tasks: Sequence[int] = (), reason: str = "None", nodes: str = "") -> None:
        """Put a job into the queue."""
        content = self._read()
        before = content["jobs"].get(number, {"comment": ""})
        content["jobs"][number] = before | {"state": state, "tasks": list(tasks), "reason": reason, "nodes": nodes}
        self._write(content)

    def end(self) -> None:
        """Remove all jobs from the queue."""
        self._write(self._read() | {"jobs": {}})

    @property
    def jobs(self) -> Mapping[str, Any]:
        """Jobs in the queue by id, with their options of sbatch and script."""
        jobs: dict[str, Any] = self._read()["jobs"]
        return jobs

    @property
    def tested(self) -> list[list[str]]:
        """Job variables in the environment of each `sbatch --test-only`."""
        variables: list[list[str]] = self._read()["tested"]
        return variables

    def calls(self, program: str) -> list[list[str]]:
        """Arguments of every call of a program."""
        return [call[1:] for call in self._read()["calls"] if call[0] == program]

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._path.read_text())
        return content

    def _write(self, state: Mapping[str, Any]) -> None:
        self._path.write_text(json.dumps(state))
