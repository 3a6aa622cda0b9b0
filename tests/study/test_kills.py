"""A study has the same results after kills of any of its processes at any time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_after_kills_of_drivers_and_a_worker_no_trial_is_lost_or_repeated_and_results_are_bit_identical() -> None:
    soak = [sys.executable, "tools/soak.py", "--sweep", "local", "ray", "--kills", "5", "--json"]
    ended = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tally = json.loads(ended.stdout)
    assert tally["kills"] == 5 and tally["workers"] >= 1 and tally["runs"] >= 2
    assert tally["differences"] == []
