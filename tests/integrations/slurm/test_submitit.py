"""Contract with submitit: fails if a new release changes what this package uses."""

import re
from pathlib import Path

import pytest
from submitit.core.utils import FailedJobError
from submitit.helpers import CommandFunction
from submitit.slurm.slurm import SlurmInfoWatcher

import modis_dist


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


def test_only_the_queue_imports_submitit() -> None:
    imports, package = re.compile(r"^\s*(from|import) submitit\b", re.MULTILINE), Path(modis_dist.__file__).parent
    assert [path.name for path in package.rglob("*.py") if imports.search(path.read_text())] == ["queue.py"]
