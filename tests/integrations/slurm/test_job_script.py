"""Job scripts: compared with golden files, and run by a real shell with unusual paths."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm import job_script as job_script
from modis_dist.integrations.slurm.job_script import LOGS, command, python, ranges, script

GOLDEN = Path(__file__).parent / "golden"
OUT = Path("/scratch/me/toy")
PYTHON = ("python3",)
GPU = Site(
    partition="gpu_p13",
    account="abc@v100",
    qos="qos_gpu-t3",
    constraint="v100-32g",
    cpus=10,
    gpus=1,
    gpu_kind="v100",
    memory="40G",
    time="1-20:00:00",
    gres=("lscratch:100",),
    warning_s=300,
    array_parallelism=4,
    options=("--hint=nomultithread", "--exclude=n[7-9]"),
    setup=("module purge", "module load python/3.11 cuda", 'source "$HOME/modis/bin/activate"'),
    python=PYTHON,
    scratch="$JOBSCRATCH/tmp",
)
CPU = Site(python=PYTHON)
SCRIPTS = {
    "array": (GPU, {"kind": "array", "indices": (0, 1, 2, 3, 7)}),
    "second_chunk": (CPU, {"kind": "array", "first": 1000, "indices": (0, 1, 5, 9, 10, 11)}),
    "finish": (GPU, {"kind": "finish"}),
    "allocation": (
        GPU.model_copy(update={"nodes": 4, "gpus": 8, "python": ("singularity", "exec", "my image.sif", "python")}),
        {"kind": "allocation"},
    ),
}

NASTY = {
    "space": "a b",
    "quotes": 'it\'s "so"',
    "command": "$(touch canary)",
    "semicolon": "a; touch canary;",
    "newline": "a\ntouch canary\n#SBATCH --uid=0",
    "backtick": "`touch canary`",
    "unicode": "Übung-数据",
    "leading dash": "-rf",
    "glob": "*?[a-z]",
    "backslash": "a\\",
    "variable": "$HOME~!&|><",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_equals_its_golden_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_script, "__version__", "1.2.3")
    site, settings = SCRIPTS[name]
    assert script(site, name="toy", out=OUT, **settings) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_sbatch_options_precede_the_first_command(name: str) -> None:
    site, settings = SCRIPTS[name]
    lines = script(site, name="toy", out=OUT, **settings).splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert not [line for line in lines[first:] if "#SBATCH" in line]
    assert sum(line.startswith("#SBATCH --signal=B:USR1@") for line in lines) == 1


def test_ranges_contain_every_index_once() -> None:
    assert ranges([0, 1, 2, 3, 7]) == "0-3,7" and ranges([5]) == "5" and ranges([1, 3, 4, 9]) == "1,3-4,9"


def test_the_default_python_of_a_job_is_the_submitting_one() -> None:
    assert python(Site()) == [sys.executable]
    assert command(Site(), kind="finish", out=OUT).split()[0] == sys.executable


# --- run by bash ------------------------------------------------------------------------------------------------


def program(folder: Path, body: str) -> str:
    """Write a program that a script runs instead of Python; return its path."""
    path = folder / "stand-in"
    path.write_text(f"#!{sys.executable} -IS\nimport json, os, signal, sys, time\n{body}\n")
    path.chmod(0o700)
    return str(path)


def started(text: str, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    (folder / "job.sh").write_text(text)
    (folder / "status").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", "job.sh"],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(text: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Return exit code and output of a script."""
    with started(text, folder, **environment) as running:
        stdout, stderr = running.communicate(timeout=60)
    return running.returncode, stdout + stderr


def site_with(folder: Path, body: str, **settings: Any) -> Site:
    return Site(python=(program(folder, body),), **settings)


@pytest.mark.parametrize("kind", ["array", "finish"])
@pytest.mark.parametrize("name", NASTY)
def test_the_shell_passes_any_path_unchanged(name: str, kind: Any, tmp_path: Path) -> None:
    out = tmp_path / NASTY[name]
    site = site_with(tmp_path, "print(json.dumps(sys.argv[1:]))")
    text = script(site, kind=kind, name="toy", out=out, first=40, indices=(2,))
    code, stdout = ended(text, tmp_path, SLURM_ARRAY_TASK_ID="2")
    task = ["42"] if kind == "array" else []
    assert code == 0 and json.loads(stdout) == ["-m", "modis_dist", "job", kind, str(out), *task]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [name for name in NASTY if name != "newline"])
def test_each_item_of_the_python_command_is_one_argument(name: str, tmp_path: Path) -> None:
    words = (program(tmp_path, "print(json.dumps(sys.argv[1:]))"), NASTY[name], "python")
    code, stdout = ended(script(Site(python=words), kind="finish", name="toy", out=tmp_path / "out"), tmp_path)
    assert code == 0 and json.loads(stdout)[:2] == [NASTY[name], "python"]
    assert not (tmp_path / "canary").exists()


def test_the_program_replaces_the_shell_and_receives_signals(tmp_path: Path) -> None:
    text = script(site_with(tmp_path, "print(os.getpid())"), kind="finish", name="toy", out=tmp_path)
    with started(text, tmp_path) as running:
        assert int(running.communicate(timeout=60)[0]) == running.pid


def test_a_signal_before_python_starts_does_not_end_the_job(tmp_path: Path) -> None:
    setup = ("touch began", "for k in $(seq 200); do test -e go && break; sleep 0.05; done")
    text = script(site_with(tmp_path, "print('listens')", setup=setup), kind="finish", name="toy", out=tmp_path)
    with started(text, tmp_path) as running:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        running.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        (tmp_path / "go").touch()
        assert running.communicate(timeout=60) == ("listens\n", "") and running.returncode == 0


def test_a_failing_setup_line_ends_the_job_with_its_exit_code(tmp_path: Path) -> None:
    site = site_with(tmp_path, "print('started')", setup=("echo first", "(exit 7)", "echo never"))
    code, stdout = ended(script(site, kind="finish", name="toy", out=tmp_path), tmp_path)
    assert code == 7 and stdout == "first\n"


def test_the_program_sees_the_environment_of_setup_and_a_private_scratch_folder(tmp_path: Path) -> None:
    body = "print(json.dumps([os.environ['A'], os.environ['TMPDIR'], oct(os.stat(os.environ['TMPDIR']).st_mode)]))"
    site = site_with(tmp_path, body, setup=("export A='x y'",), scratch="$SITE_SCRATCH/deep")
    code, stdout = ended(
        script(site, kind="finish", name="toy", out=tmp_path), tmp_path, SITE_SCRATCH=str(tmp_path / "a b")
    )
    assert code == 0 and json.loads(stdout) == ["x y", str(tmp_path / "a b" / "deep"), "0o40700"]


def test_an_unset_variable_in_scratch_ends_the_job_before_the_program(
    tmp_path: Path,
) -> None:
    site = site_with(tmp_path, "print('started')", scratch="$NO_SCRATCH/deep")
    with started(script(site, kind="finish", name="toy", out=tmp_path), tmp_path, NO_SCRATCH="") as running:
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode != 0 and stdout == ""
    assert "NO_SCRATCH: " in stderr


def test_a_tmpdir_that_the_node_does_not_have_is_unset(tmp_path: Path) -> None:
    text = script(site_with(tmp_path, "print(os.environ.get('TMPDIR'))"), kind="finish", name="toy", out=tmp_path)
    assert ended(text, tmp_path, TMPDIR=str(tmp_path / "gone")) == (0, "None\n")
    assert ended(text, tmp_path, TMPDIR=str(tmp_path)) == (0, f"{tmp_path}\n")


def test_a_script_marks_a_job_whose_python_has_not_started(tmp_path: Path) -> None:
    site = site_with(tmp_path, "", setup=("(exit 7)",))
    for kind, name in (("array", "pack-42"), ("finish", "finish"), ("allocation", "allocation")):
        text = script(site, kind=kind, name="toy", out=tmp_path, first=40, indices=(2,))
        assert ended(text, tmp_path, SLURM_ARRAY_TASK_ID="2")[0] == 7
        assert (tmp_path / "status" / f"{name}.starting").exists()


def test_every_task_has_its_own_log() -> None:
    scripts = [script(CPU, kind=kind, name="toy", out=OUT, indices=(0,)) for kind in ("array", "finish")]
    assert f"#SBATCH --output={LOGS}/%A_%a.log\n" in scripts[0] and f"#SBATCH --output={LOGS}/%j.log\n" in scripts[1]
    assert all("#SBATCH --open-mode=append\n" in text for text in scripts)
