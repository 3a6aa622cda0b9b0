"""The test cluster itself: real daemons, node failures, nothing left after stop."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.integrations.processes import is_running, wait_for
from tests.real_slurm.cluster import SCRIPT, Cluster, call_script, running

pytestmark = pytest.mark.slurm

LIMIT_S = 120  # time to give up; generous, so that a busy machine fails no test


def test_a_job_on_two_nodes_has_the_requested_gpus_on_each(cluster: Cluster) -> None:
    output = cluster.run("srun", "-N2", "--gpus-per-node=2", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")

    assert sorted(output.splitlines()) == ["n1 0,1", "n2 0,1"]


@pytest.mark.usefixtures("cluster")
def test_node_names_resolve_to_separate_addresses() -> None:
    assert [socket.gethostbyname(node) for node in ("n1", "n2")] == ["127.0.0.11", "127.0.0.12"]


def test_sacct_has_the_exit_codes_of_jobs(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "exit 3")

    cluster.wait_for(job, "FAILED", seconds=LIMIT_S)

    assert cluster.run("sacct", "-n", "-P", "-X", "-o", "ExitCode", "-j", job) == "3:0"


def test_tasks_of_an_array_have_separate_states(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1")

    cluster.wait_for(job, "COMPLETED", "FAILED", seconds=LIMIT_S)

    assert cluster.states(job) == {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED"}


@pytest.mark.usefixtures("in_cluster")
def test_commands_find_the_cluster_by_the_environment() -> None:
    assert shutil.which("slurmd")

    nodes = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%N"], capture_output=True, text=True, check=True)

    assert nodes.stdout.split() == ["n1", "n2"]


def test_nothing_listens_beyond_loopback(cluster: Cluster) -> None:
    pids = {process.pid for process in processes_of(cluster.folder)}

    addresses = {
        socket_.laddr.ip
        for socket_ in psutil.net_connections(kind="inet")
        if socket_.pid in pids and socket_.status == psutil.CONN_LISTEN
    }

    assert addresses
    assert all(address.startswith("127.") for address in addresses)


def test_starting_a_healthy_cluster_changes_nothing(cluster: Cluster) -> None:
    before = {process.pid for process in processes_of(cluster.folder)}

    call_script("start", cluster.folder)

    assert {process.pid for process in processes_of(cluster.folder)} == before


def test_a_job_of_a_failed_node_is_node_fail_and_runs_again_when_the_node_is_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, f"echo $$ > {tmp_path}/life-${{SLURM_RESTART_COUNT:-0}}; sleep 600", "-w", "n1")
    first, second = tmp_path / "life-0", tmp_path / "life-1"
    assert wait_for(lambda: first.exists() and first.read_text(), seconds=LIMIT_S)
    shell = psutil.Process(int(first.read_text()))

    cluster.kill("n1")

    assert not is_running(shell)
    assert cluster.run("sinfo", "-h", "-p", "low", "-n", "n1", "-o", "%t").startswith("down")
    cluster.wait_for(job, "NODE_FAIL", seconds=LIMIT_S)
    cluster.revive("n1")
    assert wait_for(second.exists, seconds=LIMIT_S)
    cluster.wait_for(job, "RUNNING", seconds=LIMIT_S)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED", seconds=LIMIT_S)


def test_a_second_cluster_is_restarted_after_its_controller_died_and_stop_ends_only_its_processes(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = ["--nodes", "1", "--cpus", "1", "--gpus", "0"]
    with running(*options) as second, user_of(second) as user:
        (controller,) = (process for process in processes_of(second.folder) if process.name() == "slurmctld")
        controller.kill()
        call_script("start", second.folder, *options)
        orphan = tmp_path / "orphan"
        submit(second, tmp_path, f"(setsid sh -c 'echo $$ > {orphan}; sleep 600' &)")
        assert wait_for(lambda: orphan.exists() and orphan.read_text(), seconds=LIMIT_S)

        call_script("stop", second.folder)

        assert [process.pid for process in processes_of(second.folder)] == [user]
        assert str(second.folder) not in Path("/etc/hosts").read_text()
    assert not second.folder.exists()
    assert wait_for(lambda: cluster.run("sinfo", "-h", "-p", "low", "-o", "%D %t") == "2 idle", seconds=LIMIT_S)
    assert socket.gethostbyname("n1") == "127.0.0.11"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["begin", "folder"],
        ["start"],
        ["start", "folder", "--nodes"],
        ["start", "folder", "--nodes", "0"],
        ["start", "folder", "--gpus", "many"],
        ["kill", "folder"],
        ["stop", "folder", "--all"],
    ],
)
def test_wrong_usage_exits_with_2_and_one_line_and_creates_nothing(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["start", "stop"])
def test_a_folder_with_other_files_is_refused_unchanged(command: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()

    done = subprocess.run([SCRIPT, command, tmp_path], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis"]


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """Submit a shell command and return the job id."""
    return cluster.run("sbatch", "--parsable", "-o", str(folder / "out"), *options, "--wrap", script)


@contextmanager
def user_of(cluster: Cluster) -> Iterator[int]:
    """Start a process with the environment of the cluster that is not part of it."""
    with subprocess.Popen(["sleep", "600"], env=dict(cluster.env)) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started with the configuration of the cluster; zombies have no environment."""
    return [
        process for process in psutil.process_iter() if _configuration(process) == str(folder / "etc" / "slurm.conf")
    ]


def _configuration(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("SLURM_CONF")
    except psutil.Error:
        return None
