"""Checks of doctor: on this machine, and on clusters with fake Slurm commands."""

import fcntl
import json
import os
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from modis_dist.cli.main import app, run
from modis_dist.config.cluster import Site
from modis_dist.integrations.doctor import all_reduce
from modis_dist.integrations.doctor import checks as doctor
from modis_dist.integrations.doctor import machine as doctor_machine
from modis_dist.integrations.doctor.all_reduce import AllReduceResult, RankResult
from modis_dist.integrations.slurm.job_script import requests
from modis_dist.integrations.slurm.slurm_commands import check_request
from modis_dist.runtime.finding import Finding
from tests.ranks import CONTEXT, LIMIT_S

SITE = Site(partition="gpu", nodes=2, cpus=8, gpus=2, gpu_kind="v100", memory="32G", time="20:00:00", account="me")

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put fake Slurm commands on PATH; return a function that sets the answer of a command."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def set_answer(program: str, text: str = "", *, error: str = "", code: int = 0, arguments: str = "*") -> None:
        """Set the answer to arguments that match a shell pattern; other answers remain."""
        path, number = programs / program, len(list(programs.parent.iterdir()))
        (programs.parent / f"out{number}").write_text(text)
        (programs.parent / f"err{number}").write_text(error)
        paths = f"/bin/cat {programs.parent}/out{number}; /bin/cat {programs.parent}/err{number} >&2"
        before = path.read_text().removeprefix("#!/bin/sh\n") if path.exists() else ""
        path.write_text(f'#!/bin/sh\ncase "$*" in {arguments}) {paths}; exit {code};; esac\n{before}')
        path.chmod(0o700)

    set_answer("srun")
    set_answer("sbatch", error="sbatch: Job 7 to start at 2026-01-01T00:00:00 using 16 processors on nodes n[1-2]\n")
    return set_answer


def finding_of(findings: list[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


# --- a cluster ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_a_job_that_slurm_would_accept_is_ok() -> None:
    finding = check_request(requests(SITE, nodes=2))
    assert (finding.level, finding.fix) == ("ok", "") and finding.message.startswith("Job 7 to start at ")


def test_a_refusal_of_sbatch_is_quoted(fake: Fake) -> None:
    refusal = "Batch job submission failed: Invalid account or account/partition combination specified"
    fake("sbatch", code=1, error=f"sbatch: error: {refusal}\n", arguments="*--account=me*--time=20:00:00*--wrap=true")
    finding = check_request(requests(SITE, nodes=2))
    assert finding.level == "error" and finding.message == refusal and "profile" in finding.fix


@pytest.mark.usefixtures("fake")
def test_a_missing_sbatch_is_an_error_finding(tmp_path: Path) -> None:
    (tmp_path / "programs" / "sbatch").unlink()
    finding = check_request([])
    assert finding.level == "error" and "sbatch" in finding.message and "login node" in finding.fix


# --- an all-reduce --------------------------------------------------------------------------------------------


def test_two_processes_on_this_machine_all_reduce_over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    finding = doctor.on_this_machine()
    assert (finding.level, finding.fix) == ("ok", ""), finding
    assert finding.message.startswith("4 MB over process 1, process 2 in ") and "(gloo)" in finding.message


def _run_slurm_task(rank: int, folder: Path) -> None:
    """Run one task of Slurm in a separate process."""
    numbered = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    os.environ |= {**numbered, "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    all_reduce.run_rank(folder)


def test_tasks_of_slurm_connect_to_an_address_of_rank_0(tmp_path: Path) -> None:
    steps = [CONTEXT.Process(target=_run_slurm_task, args=(rank, tmp_path)) for rank in range(2)]
    for step in steps:
        step.start()
    for step in steps:
        step.join(LIMIT_S)
    result = all_reduce.read_all_reduce(tmp_path, 2)
    assert set(result.started) == set(result.done) == {0, 1}
    assert not any(done.error for done in result.done.values()), result
    assert json.loads((tmp_path / all_reduce.RENDEZVOUS).read_text())["address"].startswith("tcp://")
    assert [result.done[rank].excluded for rank in range(2)] == [None, True]
    assert [finding.level for finding in doctor.locks_between(result, ["n1", "n2"])] == ["ok"]


def test_nodes_that_do_not_start_are_named_with_the_error_of_srun(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``srun`` starts no process and prints the error of a failed node."""
    monkeypatch.chdir(tmp_path)
    fake("scontrol", "n1\nn2\n", arguments='"show hostnames"*')
    fake("srun", error="srun: error: Node failure on n2\n", code=1)
    (finding,) = doctor.over_allocation([], tmp_path, nodes=2)
    assert finding.level == "error" and re.match(r"n1, n2 .*: Node failure on n2$", finding.message)
    assert not list(tmp_path.glob(".modis-doctor-*")), "the folder was not removed"


def test_absent_failed_and_unconnected_processes_have_different_messages() -> None:
    hosts = {0: "a", 1: "b"}
    late = doctor.all_reduce_finding(AllReduceResult({0: "a"}, {}), ["n1", "n2"], srun_error="")
    assert late.level == "error" and re.match(r"n2 .*\b60 s$", late.message)
    unconnected = doctor.all_reduce_finding(AllReduceResult(hosts, {}), ["n1", "n2"], srun_error="")
    assert unconnected.level == "error" and re.match(r"n1, n2 .*\b60 s\b", unconnected.message)
    assert unconnected.message.removeprefix("n1, ") != late.message
    failed = doctor.all_reduce_finding(
        AllReduceResult(hosts, {0: RankResult("a", error="RuntimeError: no route")}), ["n1", "n2"], srun_error=""
    )
    assert failed.message.startswith("n1: RuntimeError: no route; n2 ")


def test_the_time_is_that_of_the_slowest_node_and_nccl_is_timed_if_every_node_has_a_gpu() -> None:
    hosts = {0: "a", 1: "b"}
    complete = AllReduceResult(hosts, {0: RankResult("a", 0.5, 0.01), 1: RankResult("b", 0.25, 0.02)})
    message = doctor.all_reduce_finding(complete, ["n1", "n2"], srun_error="").message
    assert re.match(r"4 MB .*n1, n2 .*0\.500 s \(gloo\), 0\.0200 s \(NCCL\)$", message)
    incomplete = AllReduceResult(hosts, {0: RankResult("a", 0.5, 0.01), 1: RankResult("b", 0.25)})
    message = doctor.all_reduce_finding(incomplete, ["n1", "n2"], srun_error="").message
    assert re.match(r"4 MB .*n1, n2 .*0\.500 s \(gloo\)$", message)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("job", "site", "where"),
    [
        (None, None, "here"),
        (None, SITE, "not allocated"),
        (None, SITE.model_copy(update={"nodes": 1}), "not allocated"),
        ("7", None, "3 nodes"),
        ("7", SITE, "3 nodes"),
        ("7", Site(executor="local"), "here"),
    ],
)
def test_the_all_reduce_is_over_the_allocation_or_else_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: str | None, site: Site | None, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setattr(doctor, "on_this_machine", lambda: Finding("all-reduce", "ok", "here"))
    monkeypatch.setattr(doctor, "not_allocated", lambda *_: Finding("all-reduce", "ok", "not allocated"))
    monkeypatch.setattr(doctor, "over_allocation", lambda *_, nodes: [Finding("all-reduce", "ok", f"{nodes} nodes")])
    assert finding_of(list(doctor.examine(site, folder=tmp_path)), "all-reduce").message == where


def test_outside_an_allocation_the_fix_is_an_salloc_command() -> None:
    finding = doctor.not_allocated(requests(SITE, nodes=2), "my site.yaml", Path("/scratch/me"))
    assert finding.level == "warning"
    assert "salloc --partition=gpu --account=me --nodes=2 " in finding.fix
    assert finding.fix.endswith("modis-dist doctor --cluster 'my site.yaml' --out /scratch/me")


def test_a_process_without_slurms_variables_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(all_reduce.signal, "alarm", lambda _: None)
    assert run(["job", "all-reduce", str(tmp_path)]) == 2
    assert "`modis-dist doctor`" in capsys.readouterr().err


# --- this machine ---------------------------------------------------------------------------------------------


def test_installed_versions_are_ok_and_old_or_missing_ones_are_named() -> None:
    def other(name: str) -> str:
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return "1.13.1" if name == "torch" else metadata.version(name)

    assert doctor_machine.versions().level == "ok"
    finding = doctor_machine.versions(other)
    assert finding.level == "error" and "torch 1.13.1, ray missing" in finding.message
    assert "torch>=2.11 (installed: 1.13.1)" in finding.fix and "(installed: missing)" in finding.fix
    assert "pip install" in finding.fix and "mlflow" not in finding.fix


def test_a_package_that_is_not_installed_itself_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "PACKAGE", "modis-dist-that-is-not-there")
    finding = doctor_machine.versions()
    assert finding.level == "warning" and "pip install ." in finding.fix


@pytest.mark.parametrize(
    ("driver", "requested", "level"), [(False, 0, "ok"), (True, 0, "error"), (False, 2, "error"), (True, 2, "error")]
)
def test_a_build_without_cuda_is_an_error_if_there_are_gpus_or_jobs_request_them(
    driver: bool, requested: int, level: str
) -> None:
    finding = doctor_machine.without_cuda(driver=driver, requested=requested)
    assert finding.level == level and ("https://pytorch.org/get-started" in finding.fix) == (level == "error")


def test_a_driver_without_a_gpu_is_a_warning_that_quotes_pytorch() -> None:
    assert doctor_machine.no_gpu([], driver=False).level == "ok"
    finding = doctor_machine.no_gpu(["The NVIDIA driver is too old"], driver=True)
    assert finding.level == "warning" and finding.message.endswith(": The NVIDIA driver is too old")
    assert "CUDA_VISIBLE_DEVICES" in finding.fix


def test_a_gpu_that_runs_no_kernel_is_an_error_that_quotes_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cpu": "Some GPU", "cpu:0": "Another"}  # the kernel runs on any device
    finding = doctor_machine.kernels(names)
    assert (finding.level, finding.message) == ("ok", "Some GPU, Another")
    genuine = torch.ones

    def ones(*sizes: int, device: str) -> torch.Tensor:
        if device == "cpu:0":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return genuine(*sizes, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    finding = doctor_machine.kernels(names)
    assert finding.level == "error" and "nvidia-smi" in finding.fix
    error = "CUDA error: no kernel image is available for execution on the device"
    assert finding.message == f"Some GPU, Another; cpu:0: {error}"


def test_little_space_for_temporary_files_is_a_warning_and_a_folder_that_is_not_writable_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine.tempfile, "gettempdir", lambda: f"/tmp/{'long' * 20}")
    usage = doctor_machine.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: usage)
    space = doctor_machine.temporary_space()
    assert space.level == "warning" and space.message == "/tmp: 1.0 GB free" and "TMPDIR" in space.fix
    monkeypatch.setattr(doctor_machine.os, "access", lambda *_: False)
    assert doctor_machine.temporary_space().level == "error"


def test_an_output_folder_with_locks_and_permissions_is_ok_and_stays_empty(tmp_path: Path) -> None:
    findings = doctor_machine.output_folder(tmp_path)
    assert [(finding.check, finding.level) for finding in findings] == [("locks", "ok"), ("permissions", "ok")]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_output_folder_is_an_error_finding(tmp_path: Path) -> None:
    finding = finding_of(doctor_machine.output_folder(tmp_path / "gone"), "output folder")
    assert finding.level == "error" and "No such file" in finding.message and finding.fix


def test_locks_that_exclude_nobody_or_are_not_supported_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # only in this process: the other one gets the lock
    finding = doctor_machine.locks(tmp_path)
    assert finding.level == "error" and "second process" in finding.message and "-o flock" in finding.fix

    def absent(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", absent)
    assert doctor_machine.locks(tmp_path).message == "flock: Function not implemented"


def test_a_lock_of_another_process_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert doctor_machine.lock_is_held(path)
    assert not doctor_machine.lock_is_held(path)


def test_folders_that_others_may_enter_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def open_to_all(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        path.chmod(0o755)

    monkeypatch.setattr(Path, "mkdir", open_to_all)
    finding = doctor_machine.permissions(tmp_path)
    assert finding.level == "error" and finding.message.endswith(" 0755") and "default access lists" in finding.fix


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def set_finding(monkeypatch: pytest.MonkeyPatch) -> Callable[[Finding], None]:
    """Return a function that makes doctor return an ok finding and the given finding."""

    def set_second(finding: Finding) -> None:
        monkeypatch.setattr(doctor, "examine", lambda *_, **__: iter([Finding("this", "ok", "[is] well"), finding]))

    return set_second


def test_an_error_exits_with_code_3_and_a_line_that_counts_failed_checks(
    set_finding: Callable[[Finding], None], capsys: pytest.CaptureFixture[str]
) -> None:
    set_finding(Finding("that", "error", "is not", "repair it"))
    assert run(["doctor"]) == 3
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "ok      this                  [is] well",
        "error   that                  is not",
        "        repair it",
    ]
    assert re.fullmatch(r"error: doctor: 1 of 2 .*\(that\)\n", captured.err)


def test_warnings_end_with_exit_code_0(
    set_finding: Callable[[Finding], None], capsys: pytest.CaptureFixture[str]
) -> None:
    set_finding(Finding("that", "warning", "is slow", "wait"))
    assert run(["doctor"]) == 0
    captured = capsys.readouterr()
    assert "warning that                  is slow\n        wait\n" in captured.out and not captured.err


def test_json_holds_every_finding(set_finding: Callable[[Finding], None], capsys: pytest.CaptureFixture[str]) -> None:
    set_finding(Finding("that", "error", "is not", "repair it"))
    assert run(["doctor", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == [
        {"check": "this", "level": "ok", "message": "[is] well", "fix": ""},
        {"check": "that", "level": "error", "message": "is not", "fix": "repair it"},
    ]


def test_an_invalid_profile_is_refused_before_any_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text("partitoin: gpu\n")
    assert run(["doctor", "--cluster", str(tmp_path / "site.yaml")]) == 2
    captured = capsys.readouterr()
    assert not captured.out and "partitoin" in captured.err


@pytest.mark.usefixtures("fake")
def test_the_command_checks_machine_and_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("partition: gpu\nnodes: 2\ncpus: 8\ntime: '20:00:00'\n")
    code = run(["doctor", "--cluster", "site.yaml", "--json"])
    seen = {finding["check"]: finding["level"] for finding in json.loads(capsys.readouterr().out)}
    assert code == (3 if "error" in seen.values() else 0)
    assert {"versions", "GPUs", "temporary space", "locks", "permissions", "sbatch --test-only"} <= set(seen)
    assert seen["all-reduce"] == "warning", "no allocation"


def test_commands_of_jobs_are_not_in_the_help() -> None:
    help_page = CliRunner().invoke(app, ["--help"]).output
    assert " doctor " in help_page and " job " not in help_page
