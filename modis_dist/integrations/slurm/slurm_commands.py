"""Slurm's commands: run them and return their output or a one-line error."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from modis_dist.runtime.finding import Finding
from modis_dist.runtime.text import shown

TIMEOUT_S = 60.0  # Slurm's commands give up earlier
GRACE_S = 5.0  # for a step to end after its time limit
JOB_VARIABLES, CLUSTER_VARIABLES = ("SBATCH_", "SLURM_", "SRUN_", "SALLOC_"), ("SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class CommandOutput:
    """Output of a command."""

    stdout: str
    stderr: str = ""
    error: str = ""  # one line on why it failed; empty on success


def run_command(*command: str) -> CommandOutput:
    """Run a command and return its output; never raises."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        return CommandOutput("", error=f"{command[0]} not found on PATH")
    except OSError as error:
        return CommandOutput("", error=str(error.strerror))
    except subprocess.TimeoutExpired:
        return CommandOutput("", error=f"no answer within {TIMEOUT_S:.0f} s")
    return CommandOutput(done.stdout, done.stderr, one_line(done.stderr, command[0]) if done.returncode else "")


def one_line(stderr: str, program: str) -> str:
    """Return standard error as one line without the program's name."""
    lines = [line.removeprefix(f"{program}: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    return shown("; ".join(line for line in lines if line) or f"{program} failed without a message")


def check_request(options: Sequence[str], *, check: str = "sbatch --test-only") -> Finding:
    """Check that Slurm would accept a job with these options of sbatch; submit nothing."""
    with without_job_variables():
        output = run_command("sbatch", "--test-only", *options, "--wrap=true")
    fix = (
        "run this on a login node, after `module load slurm` if the site needs it; change the key of the profile that "
        "Slurm names (partition, account, qos, time, max_array, options)"
    )
    return Finding.of(check, output.error or one_line(output.stderr, "sbatch"), ok=not output.error, fix=fix)


@contextmanager
def without_job_variables() -> Iterator[None]:
    """Hide the variables of the user or an outer job by which sbatch would override the options of a script."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(JOB_VARIABLES) and name not in CLUSTER_VARIABLES
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def allocated_nodes() -> int:
    """Return the number of nodes of the Slurm job that this process is in; 0 if it is in none that has ``srun``."""
    if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
        return 0
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def node_names(nodes: int) -> list[str]:
    """Return Slurm's names of the nodes of this job in the order of their tasks."""
    names = run_command("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")).stdout.split()
    return names if len(names) == nodes else [f"node {number}" for number in range(1, nodes + 1)]


def run_on_nodes(command: Sequence[str], nodes: int, *, limit_s: float) -> str:
    """Run a command once on each node; return the error of srun, empty on success or after the time limit."""
    spread = ["--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--input=none"]
    with subprocess.Popen(
        ["srun", *spread, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as step:
        try:
            stderr = step.communicate(timeout=limit_s)[1]
            return one_line(stderr, "srun") if step.returncode else ""
        except subprocess.TimeoutExpired:
            step.terminate()
            with suppress(subprocess.TimeoutExpired):
                step.communicate(timeout=GRACE_S)
            return ""
        finally:
            step.kill()
