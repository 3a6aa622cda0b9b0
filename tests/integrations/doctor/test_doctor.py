"""What the doctor finds and advises: on this machine as it is, and on clusters whose commands are small scripts."""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modis_dist.cli.main import app, run
from modis_dist.config.cluster import Site
from modis_dist.integrations.doctor import all_reduce
from modis_dist.integrations.doctor import checks as doctor
from modis_dist.integrations.doctor import machine as doctor_machine
from modis_dist.integrations.doctor.all_reduce import Answers, Done
from modis_dist.integrations.slurm import checks as doctor_slurm
from modis_dist.integrations.slurm.job_script import requests
from modis_dist.runtime.finding import Finding
from tests.ranks import CONTEXT, LIMIT_S

CONFIG = """Configuration data as of 2026-01-01T00:00:00
ClusterName             = big
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 24.05.1
SlurmctldParameters     = enable_configless,preempt_send_user_signal

Slurmctld(primary) at head is UP
"""
PARTITION = (
    "PartitionName=gpu AllowGroups=ALL Default=YES QoS=N/A DefaultTime=01:00:00 GraceTime=60 MaxNodes=8 "
    "MaxTime=2-00:00:00 MinNodes=0 Nodes=n[1-2] OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=64 "
    "TotalNodes=2 TRES=cpu=64,mem=128000M,node=2,billing=64\n"
)
NODES = "32|64000|gpu:v100:4(S:0-1)\n32|64000|gpu:v100:4(S:0-1)\n"
SITE = Site(partition="gpu", nodes=2, cpus=8, gpus=2, gpu_kind="v100", memory="32G", time="20:00:00", account="me")

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A cluster on PATH on which all is well, and a function that has one of its commands say something else."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def says(program: str, text: str = "", *, error: str = "", code: int = 0, asked: str = "*") -> None:
        """``asked`` is a pattern of the shell for all arguments; what was said before to others stays."""
        path, number = programs / program, len(list(programs.parent.iterdir()))
        (programs.parent / f"out{number}").write_text(text)
        (programs.parent / f"err{number}").write_text(error)
        paths = f"/bin/cat {programs.parent}/out{number}; /bin/cat {programs.parent}/err{number} >&2"
        before = path.read_text().removeprefix("#!/bin/sh\n") if path.exists() else ""
        path.write_text(f'#!/bin/sh\ncase "$*" in {asked}) {paths}; exit {code};; esac\n{before}')
        path.chmod(0o700)

    for program in ("squeue", "scancel", "srun", "sacct"):
        says(program)
    says("sinfo", NODES)
    says("sbatch", error="sbatch: Job 7 to start at 2026-01-01T00:00:00 using 16 processors on nodes n[1-2]\n")
    says("scontrol", CONFIG, asked='"show config"')
    says("scontrol", PARTITION, asked='"--oneliner show partition"*')
    return says


def of(findings: list[Finding], what: str) -> Finding:
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def examined(site: Site | None = SITE) -> list[Finding]:
    return doctor_slurm.cluster(site, requests=requests(site, nodes=site.nodes) if site else [])


# --- a cluster ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_a_cluster_that_fits_its_profile_is_good_all_over_and_needs_no_advice() -> None:
    found = examined()
    assert [finding for finding in found if finding.level != "good" or finding.advice] == []
    assert of(found, "controller").found == "cluster big answers, Slurm 24.05.1"
    assert of(found, "nodes of gpu").found == "2 of 2 have 8 cores and 2 GPU(s) of kind v100 and 32G, 2 needed"
    assert of(found, "a job").found.startswith("Job 7 to start at ")


@pytest.mark.parametrize(
    ("before", "after", "what", "level", "advice"),
    [
        ("JobRequeue              = 1", "JobRequeue              = 0", "requeue", "warning", "start again by hand"),
        ("= 30 sec", "= 5 sec", "KillWait", "warning", "a job that is cancelled may lose"),
        ("= 1001", "= 1000", "arrays", "bad", "set max_array: 999 in the profile"),
        ("= 1001", "= 0", "arrays", "bad", "takes no arrays"),
        (
            ",preempt_send_user_signal",
            "",
            "preemption on gpu",
            "warning",
            "SlurmctldParameters=preempt_send_user_signal",
        ),
        ("partition_prio", "qos", "preemption", "warning", "sacctmgr show qos"),
    ],
)
def test_a_setting_of_the_cluster_that_does_not_suit_jobs_is_told_with_what_to_do(
    fake: Fake, before: str, after: str, what: str, level: str, advice: str
) -> None:
    assert before in CONFIG
    fake("scontrol", CONFIG.replace(before, after), asked='"show config"')
    found = of(examined(), what)
    assert found.level == level and advice in found.advice


@pytest.mark.parametrize(
    ("before", "after", "what", "level", "advice"),
    [
        ("GraceTime=60", "GraceTime=0", "preemption on gpu", "warning", "GraceTime of a minute"),
        ("PreemptMode=REQUEUE", "PreemptMode=CANCEL", "preemption on gpu", "warning", "give the same command again"),
        ("State=UP", "State=DRAIN", "partition gpu", "bad", "it takes no jobs now"),
        ("MaxTime=2-00:00:00", "MaxTime=19:30:00", "partition gpu", "bad", "set time: 19:30:00 at most"),
        ("MaxNodes=8", "MaxNodes=1", "partition gpu", "bad", "set nodes: 1 at most"),
        ("TotalNodes=2", "TotalNodes=1", "partition gpu", "bad", "set nodes: 1 at most"),
    ],
)
def test_a_partition_that_does_not_suit_the_profile_is_told_with_what_to_do(
    fake: Fake, before: str, after: str, what: str, level: str, advice: str
) -> None:
    assert before in PARTITION
    fake("scontrol", PARTITION.replace(before, after), asked='"--oneliner show partition"*')
    found = of(examined(), what)
    assert found.level == level and advice in found.advice


@pytest.mark.parametrize("mode", ["OFF", "SUSPEND"])
def test_preemption_that_ends_no_job_is_good_without_a_signal(fake: Fake, mode: str) -> None:
    fake("scontrol", CONFIG.replace(",preempt_send_user_signal", ""), asked='"show config"')
    fake("scontrol", PARTITION.replace("PreemptMode=REQUEUE", f"PreemptMode={mode}"), asked='"--oneliner"*')
    assert of(examined(), "preemption on gpu").level == "good"


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ({"cpus": 33}, "up to 32 cores"),
        ({"gpus": 5}, "4 GPUs"),
        ({"gpu_kind": "a100"}, "gpu:v100:4"),
        ({"memory": "1T"}, "64000M of memory"),
    ],
)
def test_nodes_that_have_less_than_asked_for_are_bad_and_what_they_have_is_told(
    asked: dict[str, object], held: str
) -> None:
    found = of(examined(SITE.model_copy(update=asked)), "nodes of gpu")
    assert found.level == "bad" and found.found.startswith("0 of 2 have ") and held in found.advice


@pytest.mark.parametrize(
    ("gpus", "kind", "number"),
    [
        ("gpu:2", None, 2),
        ("gpu:2", "v100", 0),
        ("(null)", None, 0),
        ("gpu:a100:4(S:0-1),gpu:v100:2,shard:8", None, 6),
        ("gpu:a100:4(S:0-1),gpu:v100:2,shard:8", "v100", 2),
        ("gpu:a100_1g.5gb:7", "a100_1g.5gb", 7),
    ],
)
def test_gpus_are_counted_as_sinfo_writes_them(gpus: str, kind: str | None, number: int) -> None:
    assert doctor_slurm.NodeOffer(1, 1, gpus).num_gpus(kind) == number


def test_a_partition_that_is_not_there_is_quoted_and_the_rest_is_still_looked_at(fake: Fake) -> None:
    fake("scontrol", error="Partition gpu not found\n", code=1, asked='"--oneliner"*')
    found = examined()
    gone = of(found, "partition gpu")
    assert gone.level == "bad" and gone.found == "Partition gpu not found" and "sinfo -s" in gone.advice
    assert of(found, "a job").level == "good"


def test_without_a_partition_in_the_profile_the_default_one_is_looked_at_and_none_is_bad(fake: Fake) -> None:
    site = SITE.model_copy(update={"partition": None})
    two = PARTITION.replace("=gpu ", "=cpu ").replace("Default=YES", "Default=NO")
    fake("scontrol", two + PARTITION, asked='"--oneliner show partition"')
    assert of(examined(site), "partition gpu").level == "good"
    fake("scontrol", two, asked='"--oneliner show partition"')
    none = of(examined(site), "partition")
    assert none.level == "bad" and none.advice.endswith(": cpu")


def test_what_sbatch_says_against_a_job_of_the_profile_is_quoted(fake: Fake) -> None:
    said = "Batch job submission failed: Invalid account or account/partition combination specified"
    fake("sbatch", code=1, error=f"sbatch: error: {said}\n", asked="*--account=me*--time=20:00:00*--wrap=true")
    found = of(examined(), "a job")
    assert found.level == "bad" and found.found == said and "mend the profile" in found.advice


def test_without_accounting_only_how_jobs_ended_is_unknown(fake: Fake) -> None:
    fake("sacct", error="Slurm accounting storage is disabled\n", code=1)
    found = of(examined(), "accounting")
    assert found.level == "warning" and found.found == "Slurm accounting storage is disabled" and found.advice


def test_a_controller_that_is_down_is_one_bad_finding_in_its_own_words(fake: Fake) -> None:
    said = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)"
    fake("scontrol", error=f"{said}\n", code=1)
    found = examined()
    assert [finding.what for finding in found if finding.level != "good"] == ["controller"]
    assert of(found, "controller").found == said and of(found, "controller").advice


@pytest.mark.usefixtures("fake")
def test_missing_commands_are_bad_for_a_profile_of_slurm_only(tmp_path: Path) -> None:
    (tmp_path / "programs" / "squeue").unlink()
    (tmp_path / "programs" / "srun").unlink()
    (found,) = examined()
    assert found.level == "bad" and found.found == "squeue, srun not on PATH" and "login node" in found.advice
    assert [finding.level for finding in examined(None)] == ["warning"]


@pytest.mark.usefixtures("fake")
def test_without_a_profile_nothing_is_compared_with_one() -> None:
    whats = [finding.what for finding in examined(None)]
    assert whats == ["Slurm's commands", "controller", "accounting", "requeue", "preemption", "KillWait"]


# --- an all-reduce --------------------------------------------------------------------------------------------


def test_two_processes_of_this_machine_sum_over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = doctor.on_this_machine()
    assert (found.level, found.advice) == ("good", ""), found
    assert found.found.startswith("4 MB over process 1, process 2 in ") and "(gloo)" in found.found


def _as_a_step_of_slurm(rank: int, folder: Path) -> None:
    """In a process of its own."""
    numbered = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    os.environ |= {**numbered, "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    all_reduce.take_part(folder)


def test_processes_that_slurm_numbers_meet_at_an_address_of_the_first(tmp_path: Path) -> None:
    steps = [CONTEXT.Process(target=_as_a_step_of_slurm, args=(rank, tmp_path)) for rank in range(2)]
    for step in steps:
        step.start()
    for step in steps:
        step.join(LIMIT_S)
    found = all_reduce.answers(tmp_path, 2)
    assert set(found.came) == set(found.done) == {0, 1} and not any(done.error for done in found.done.values()), found
    assert json.loads((tmp_path / all_reduce.MEETING).read_text())["address"].startswith("tcp://")
    assert [found.done[rank].kept_out for rank in range(2)] == [None, True]
    assert [f.found for f in doctor.locks_between(found, ["n1", "n2"])] == ["n2 kept out by n1"]


def test_the_nodes_of_an_allocation_that_did_not_come_are_named(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here srun starts nothing but says what it says where a node fails."""
    monkeypatch.chdir(tmp_path)
    fake("scontrol", "n1\nn2\n", asked='"show hostnames"*')
    fake("srun", error="srun: error: Node failure on n2\n", code=1)
    (found,) = doctor.over_allocation([], tmp_path, nodes=2)
    assert found.level == "bad" and found.found == "n1, n2 did not come: Node failure on n2"
    assert "see this folder under the same path" in found.advice
    assert not list(tmp_path.glob(".modis-doctor-*")), "its folder is removed"


def test_who_came_late_who_failed_and_who_cannot_reach_the_others_are_told_apart() -> None:
    came = {0: "a", 1: "b"}
    late = doctor.told(Answers({0: "a"}, {}), ["n1", "n2"], said="")
    assert late.level == "bad" and late.found == "n2 did not come within 60 s"
    apart = doctor.told(Answers(came, {}), ["n1", "n2"], said="")
    assert apart.level == "bad" and apart.found.startswith("n1, n2 came, and did not finish within 60 s")
    assert "may connect to each other" in apart.advice
    failed = doctor.told(Answers(came, {0: Done("a", error="RuntimeError: no route")}), ["n1", "n2"], said="")
    assert failed.found.startswith("n1: RuntimeError: no route; n2 came")


def test_the_slowest_node_is_told_and_nccl_only_where_every_node_has_a_gpu() -> None:
    came = {0: "a", 1: "b"}
    both = Answers(came, {0: Done("a", 0.5, 0.01), 1: Done("b", 0.25, 0.02)})
    assert doctor.told(both, ["n1", "n2"], said="").found == "4 MB over n1, n2 in 0.500 s (gloo), 0.0200 s (NCCL)"
    one = Answers(came, {0: Done("a", 0.5, 0.01), 1: Done("b", 0.25)})
    assert doctor.told(one, ["n1", "n2"], said="").found == "4 MB over n1, n2 in 0.500 s (gloo)"


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
def test_the_nodes_of_an_allocation_are_tried_and_otherwise_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: str | None, site: Site | None, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setattr(doctor, "on_this_machine", lambda: Finding("all-reduce", "good", "here"))
    monkeypatch.setattr(doctor, "not_allocated", lambda *_: Finding("all-reduce", "good", "not allocated"))
    monkeypatch.setattr(doctor, "over_allocation", lambda *_, nodes: [Finding("all-reduce", "good", f"{nodes} nodes")])
    assert of(list(doctor.examine(site, requests=[], folder=tmp_path)), "all-reduce").found == where


def test_outside_an_allocation_it_is_said_how_to_ask_for_one() -> None:
    found = doctor.not_allocated(requests(SITE, nodes=2), "my site.yaml", Path("/scratch/me"))
    assert found.level == "warning"
    assert "salloc --partition=gpu --account=me --nodes=2 " in found.advice
    assert found.advice.endswith("modis-dist doctor --cluster 'my site.yaml' --out /scratch/me")


def test_a_step_that_no_one_has_numbered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(all_reduce.signal, "alarm", lambda _: None)
    assert run(["job", "all-reduce", str(tmp_path)]) == 2
    assert "`modis-dist doctor`" in capsys.readouterr().err


# --- this machine ---------------------------------------------------------------------------------------------


def test_versions_as_installed_are_good_and_old_or_missing_ones_are_named() -> None:
    def other(name: str) -> str:
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return "1.13.1" if name == "torch" else metadata.version(name)

    assert doctor_machine.versions().level == "good"
    found = doctor_machine.versions(other)
    assert found.level == "bad" and "torch 1.13.1, ray missing" in found.found
    assert "torch>=2.11 (1.13.1 here)" in found.advice and "(missing here)" in found.advice
    assert "pip install" in found.advice and "mlflow" not in found.advice


def test_a_package_that_is_not_installed_itself_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "PACKAGE", "modis-dist-that-is-not-there")
    found = doctor_machine.versions()
    assert found.level == "warning" and "pip install ." in found.advice


@pytest.mark.parametrize(
    ("flags", "found"),
    [("fpu avx2", "emulated"), ("avx512_bf16 amx_bf16", "fast (AMX_BF16, AVX512_BF16)")],
)
def test_bf16_of_the_cpu_is_told_from_its_flags(tmp_path: Path, flags: str, found: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert doctor_machine.bf16_of_cpu(tmp_path / "cpuinfo").found.startswith(found)


@pytest.mark.parametrize(
    ("driver", "wanted", "level"), [(False, 0, "good"), (True, 0, "bad"), (False, 2, "bad"), (True, 2, "bad")]
)
def test_a_build_without_cuda_is_bad_where_there_are_gpus_or_jobs_ask_for_them(
    driver: bool, wanted: int, level: str
) -> None:
    found = doctor_machine.without_cuda(driver=driver, wanted=wanted)
    assert found.level == level and ("install a build" in found.advice) == (level == "bad")


def test_a_driver_without_a_gpu_for_pytorch_is_told_with_what_pytorch_says() -> None:
    assert doctor_machine.no_gpu([], driver=False).level == "good"
    found = doctor_machine.no_gpu(["The NVIDIA driver is too old"], driver=True)
    assert found.level == "warning" and found.found.endswith(": The NVIDIA driver is too old")
    assert "CUDA_VISIBLE_DEVICES" in found.advice


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),  # machine code of the same generation
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX is compiled for what is later
        ((7, 0), ["sm_75", "compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((12, 0), ["sm_100", "sm_120"], True),
    ],
)
def test_a_gpu_whose_architecture_is_not_in_the_build_is_bad(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    found = doctor_machine.architecture([("Some GPU", capability)], built_for, build="2.13.0")
    name = f"sm_{capability[0]}{capability[1]}"
    assert found.level == ("good" if runs else "bad") and found.found == f"Some GPU ({name})"
    assert runs or f"no code for {name} (it has {', '.join(built_for)})" in found.advice


def test_a_loopback_that_refuses_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_machine.loopback().level == "good"

    def refused(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(doctor_machine.socket, "create_connection", refused)
    found = doctor_machine.loopback()
    assert found.level == "bad" and "Connection refused" in found.found and "firewall" in found.advice


@pytest.mark.parametrize(
    ("address", "nodes", "level"), [("127.0.1.1", 1, "good"), ("127.0.1.1", 2, "warning"), ("192.0.2.7", 2, "good")]
)
def test_a_host_name_that_leads_to_loopback_matters_on_several_nodes_only(
    monkeypatch: pytest.MonkeyPatch, address: str, nodes: int, level: str
) -> None:
    monkeypatch.setattr(doctor_machine.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (address, 0))])
    found = doctor_machine.host_name(nodes=nodes)
    assert found.level == level and found.found.endswith(f" is {address}")
    assert ("/etc/hosts" in found.advice) == (level == "warning")


def test_temporary_files_are_told_with_what_jobs_use_and_little_space_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine.tempfile, "gettempdir", lambda: f"/tmp/{'long' * 20}")
    usage = doctor_machine.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: usage)
    files, space = doctor_machine.temporary_folder(scratch="$JOBSCRATCH")
    assert files.found.startswith("/tmp (") and "too long for the sockets" in files.found
    assert files.found.endswith("jobs use $JOBSCRATCH of their node")
    assert space.level == "warning" and space.found == "1.0 GB free in /tmp" and "set TMPDIR" in space.advice


def test_a_temporary_folder_in_the_network_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "file_system", lambda _: "nfs4")
    files = doctor_machine.temporary_folder(scratch=None)[0]
    assert files.level == "warning" and "set TMPDIR" in files.advice


def test_results_on_a_network_file_system_go_without_sqlite(tmp_path: Path) -> None:
    assert doctor_machine.kind_of_folder(tmp_path, "ext4").level == "good"
    found = doctor_machine.kind_of_folder(tmp_path, "lustre")
    assert found.level == "warning" and "lustre, in the network" in found.found and "modis-dist fetch" in found.advice


def test_a_usual_folder_locks_renames_and_is_private_and_stays_as_it_was(tmp_path: Path) -> None:
    found = doctor_machine.folder_of_runs(tmp_path)
    assert [finding.what for finding in found] == ["results", "locks", "renaming", "permissions"]
    assert [finding for finding in found[1:] if finding.level != "good"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_bad_and_no_traceback(tmp_path: Path) -> None:
    found = of(doctor_machine.folder_of_runs(tmp_path / "gone"), "writing")
    assert found.level == "bad" and "No such file" in found.found and found.advice


def test_locks_that_keep_nobody_out_or_are_not_there_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # of this process only: the other one gets the lock
    found = doctor_machine.locking(tmp_path)
    assert found.level == "bad" and "a second process got the lock" in found.found and "-o flock" in found.advice

    def absent(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", absent)
    assert doctor_machine.locking(tmp_path).found == "flock: Function not implemented"


def test_a_lock_of_another_process_is_seen_as_held_for_as_long_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert doctor_machine._locked_for_others(path)
    assert not doctor_machine._locked_for_others(path)


def test_a_file_that_is_missing_for_a_moment_while_it_is_replaced_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_two_steps(new: Path, path: Path) -> None:
        path.unlink()
        os.sched_yield()
        subprocess.run(["/bin/mv", str(new), str(path)], check=True)

    monkeypatch.setattr(Path, "replace", in_two_steps)
    found = doctor_machine.renaming(tmp_path)
    assert found.level == "bad" and "missed or torn" in found.found and found.advice


def test_folders_that_others_may_enter_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def open_to_all(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        path.chmod(0o755)

    monkeypatch.setattr(Path, "mkdir", open_to_all)
    found = doctor_machine.privacy(tmp_path)
    assert (
        found.level == "bad" and found.found == "folders are made with 0755" and "default access lists" in found.advice
    )


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[Finding], None]:
    """Has the doctor find one good thing, and another that is given."""

    def finds(finding: Finding) -> None:
        monkeypatch.setattr(doctor, "examine", lambda *_, **__: iter([Finding("this", "good", "[is] well"), finding]))

    return finds


def test_a_bad_finding_ends_with_3_and_a_line_that_counts(
    of_two: Callable[[Finding], None], capsys: pytest.CaptureFixture[str]
) -> None:
    of_two(Finding("that", "bad", "is not", "mend it"))
    assert run(["doctor"]) == 3
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "good    this                  [is] well",
        "bad     that                  is not",
        "        mend it",
    ]
    assert told.err == "error: doctor: 1 of 2 findings are bad (that); each says what to do\n"


def test_warnings_end_with_0(of_two: Callable[[Finding], None], capsys: pytest.CaptureFixture[str]) -> None:
    of_two(Finding("that", "warning", "is slow", "wait"))
    assert run(["doctor"]) == 0
    told = capsys.readouterr()
    assert "warning that                  is slow\n        wait\n" in told.out and not told.err


def test_json_holds_every_finding(of_two: Callable[[Finding], None], capsys: pytest.CaptureFixture[str]) -> None:
    of_two(Finding("that", "bad", "is not", "mend it"))
    assert run(["doctor", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == [
        {"what": "this", "level": "good", "found": "[is] well", "advice": ""},
        {"what": "that", "level": "bad", "found": "is not", "advice": "mend it"},
    ]


def test_a_profile_with_a_mistake_is_refused_before_anything_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.yaml").write_text("partitoin: gpu\n")
    assert run(["doctor", "--cluster", str(tmp_path / "site.yaml")]) == 2
    told = capsys.readouterr()
    assert not told.out and "partitoin" in told.err


@pytest.mark.usefixtures("fake")
def test_the_whole_command_finds_machine_and_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("partition: gpu\nnodes: 2\ncpus: 8\ntime: '20:00:00'\n")
    code = run(["doctor", "--cluster", "site.yaml", "--json"])
    found = {finding["what"]: finding["level"] for finding in json.loads(capsys.readouterr().out)}
    assert code == (3 if "bad" in found.values() else 0)
    assert {"versions", "cores", "loopback", "locks", "results", "controller", "nodes of gpu", "a job"} <= set(found)
    assert found["all-reduce"] == "warning", "there is no allocation"


def test_commands_of_jobs_are_not_in_the_help() -> None:
    told = CliRunner().invoke(app, ["--help"]).output
    assert " doctor " in told and " job " not in told
