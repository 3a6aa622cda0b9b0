"""The pages are served to this machine alone and nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modis_dist.errors import DataError
from modis_dist.launch import ui

MAIN = """import sys
from pathlib import Path
from modis_dist.launch.ui import serve
sys.exit(serve(Path(sys.argv[1]), port=0))"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A command that serves an empty database (MLflow makes the tables), and the address it prints."""
    (tmp_path / "mlflow.db").touch(mode=0o600)
    environment = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="40")
    command = [sys.executable, "-c", MAIN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("MLflow: http://127.0.0.1:"), (tmp_path / ui.LOG).read_text()
            yield process, line.split()[1]
        finally:
            process.kill()


def test_it_answers_on_loopback_only_and_leaves_no_process_behind(
    served: tuple["subprocess.Popen[str]", str], tmp_path: Path
) -> None:
    process, url = served
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        assert answer.status == 200
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 1
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    end = time.monotonic() + 5
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family) and time.monotonic() < end:
        time.sleep(0.05)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert [p.name for p in tmp_path.iterdir() if p.stat().st_mode & 0o077] == []


def test_the_database_is_found_in_the_folder_above_it_or_where_the_summary_says(tmp_path: Path) -> None:
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere.db"
    trial = study / "trials" / "a"
    trial.mkdir(parents=True)
    with pytest.raises(DataError, match="no MLflow database here"):
        ui.find(trial)
    (study / "summary.json").write_text(json.dumps({"mlflow": {"uri": f"sqlite:///{elsewhere}"}}))
    with pytest.raises(DataError, match="no MLflow database here"):
        ui.find(study)
    elsewhere.touch()
    assert ui.find(study) == f"sqlite:///{elsewhere}"
    (study / "summary.json").write_text(json.dumps({"mlflow": {"uri": "http://tracking.example:5000"}}))
    assert ui.find(trial) == "http://tracking.example:5000"
    (study / "mlflow.db").touch()
    assert ui.find(trial) == ui.find(study) == f"sqlite:///{study}/mlflow.db"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"mlflow": null}', '{"mlflow": {}}'])
def test_a_spoilt_summary_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match="no MLflow database here"):
        ui.find(tmp_path)


def test_a_missing_folder_is_a_data_error_with_exit_code_2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder") as caught:
        ui.serve(tmp_path / "none", port=0)
    assert caught.value.exit_code == 2
