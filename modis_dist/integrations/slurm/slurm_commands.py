"""Slurm's own commands: what they print, or in one line why they failed."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modis_dist.runtime.text import shown

ANSWER_S = 60.0  # Slurm's commands give up by themselves before
OF_JOBS, OF_CLUSTER = ("SBATCH_", "SLURM_", "SRUN_", "SALLOC_"), ("SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class Told:
    """What a command printed."""

    text: str
    remark: str = ""  # on standard error
    error: str = ""  # why it failed, in one line; empty where it did not


def ask(*command: str) -> Told:
    """What one of Slurm's commands says; never raises."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except OSError as error:
        return Told("", error=str(error.strerror))
    except subprocess.TimeoutExpired:
        return Told("", error=f"did not answer for {ANSWER_S:.0f} s")
    return Told(done.stdout, done.stderr, one_line(done.stderr, command[0]) if done.returncode else "")


def one_line(said: str, program: str) -> str:
    """What a command complained of, in one line without its name."""
    lines = [line.removeprefix(f"{program}: ").removeprefix("error: ").strip() for line in said.splitlines()]
    return shown("; ".join(line for line in lines if line) or f"{program} failed without a word")


@contextmanager
def without_defaults() -> Iterator[None]:
    """No variables, the user's or of a job that this is in, by which sbatch would overrule what stands in a script."""
    others = [name for name in os.environ if name.startswith(OF_JOBS) and name not in OF_CLUSTER]
    held = {name: os.environ.pop(name) for name in others}
    try:
        yield
    finally:
        os.environ.update(held)
