"""Contract with submitit: fails if a new release changes what this package uses."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import FailedJobError
from submitit.helpers import CommandFunction
from submitit.local import local
from submitit.slurm.slurm import SlurmInfoWatcher

from modis_dist.integrations.slurm.local_queue import COMMAND_VARIABLE, CONTROLLER


def test_a_failed_command_raises_its_standard_error() -> None:
    with pytest.raises(FailedJobError, match="refused"):
        CommandFunction(["sh", "-c", "echo refused >&2; exit 1"], verbose=False)()


def test_the_output_of_a_command_is_returned() -> None:
    assert CommandFunction(["echo", "Submitted batch job 7"], verbose=False)() == "Submitted batch job 7"


def test_rows_of_sacct_are_read_by_job_and_column() -> None:
    rows = SlurmInfoWatcher().read_info("JobID|State|NodeList\n7_0|CANCELLED by 1|n1\n8|COMPLETED|n2\n")
    assert {name: (row["State"], row["NodeList"]) for name, row in rows.items()} == {
        "7_0": ("CANCELLED by 1", "n1"),
        "8": ("COMPLETED", "n2"),
    }


def test_a_local_controller_sets_its_module_and_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def popen(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        calls.append((command, env))

    monkeypatch.setattr(local.subprocess, "Popen", popen)
    command = shlex.join(["python", "a b.sh"])
    local.start_controller(tmp_path, command, cuda_devices="0,1", timeout_min=1, stderr_to_stdout=True)
    ((words, environment),) = calls
    assert CONTROLLER in words
    assert environment[COMMAND_VARIABLE] == command and environment["CUDA_VISIBLE_DEVICES"] == "0,1"
