"""Studies and trainings on an existing Ray cluster of two nodes; a killed driver; refusals. Slow."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.config.study import Resources
from modis_dist.execution.resources import Node
from modis_dist.integrations.ray.existing_cluster import ExistingRay, RayNode, connection_error, inaccessible
from modis_dist.integrations.ray.private_cluster import PREFIX
from modis_dist.integrations.ray.tune import RayExecutor
from modis_dist.runtime.errors import ConfigError
from tests.integrations.processes import wait_for
from tests.integrations.ray.existing_ray import TwoNodes, two_nodes
from tests.integrations.ray.without_ray import train_two_ranks
from tests.study.toy_study import BARE, write_store, write_study
from tests.train import toy


@pytest.fixture(scope="module")
def ray() -> Iterator[TwoNodes]:
    with two_nodes() as started:
        yield started


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Path:
    """A training of a few seconds."""
    tree = json.loads(json.dumps(toy.TREE))
    tree["data"]["store"] = str(store)
    tree["optim"]["epochs"], tree["trainer"]["metric"] = 12, "reconstruction_mse"
    path = tmp_path / "run.yaml"
    path.write_text(yaml12.dump(tree))
    return path


def ended(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process and return its result."""
    return subprocess.run(
        [*BARE, *arguments], env=environment, capture_output=True, text=True, timeout=420, check=False
    )


def leftovers(out: Path) -> list[Path]:
    return list(out.glob(f"{PREFIX}*"))


@pytest.mark.slow
def test_a_study_on_an_existing_ray_has_the_summary_of_a_local_one_and_leaves_the_cluster_unchanged(
    ray: TwoNodes, store: Path, tmp_path: Path
) -> None:
    settings = {"folds": 1, "packing": {"enabled": False}, "probe": False}
    study = write_study(tmp_path / "ray.yaml", store, executor="ray", **settings)
    stderr = ended(["tune", str(study), "--out", str(tmp_path / "ray"), "--ray", ray.address], ray.environment)
    assert stderr.returncode == 0, stderr.stderr
    assert ray.nodes() == 2 and wait_for(lambda: not ray.workers(), seconds=30), ray.workers()
    assert not leftovers(tmp_path / "ray")
    local = write_study(tmp_path / "local.yaml", store, executor="local", **settings)
    assert command(["tune", str(local), "--out", str(tmp_path / "local")]) == 0
    summary, expected = (json.loads((tmp_path / cluster / "summary.json").read_text()) for cluster in ("ray", "local"))
    for content in (summary, expected):
        del content["seconds"], content["mlflow"]
    assert summary == expected


@pytest.mark.slow
def test_ranks_on_two_nodes_whose_driver_is_killed_are_bit_identical_to_ranks_without_ray(
    ray: TwoNodes, run: Path, tmp_path: Path
) -> None:
    out, without_ray = tmp_path / "nodes", tmp_path / "alone"
    arguments = ["train", str(run), "--workers", "2", "--ray", ray.address, "--out", str(out)]
    with (tmp_path / "output.txt").open("w") as log_file:
        driver = subprocess.Popen([*BARE, *arguments], env=ray.environment, stdout=log_file, stderr=log_file)
        try:
            saved = wait_for(lambda: list(out.glob("last/step-*")), seconds=120)
            assert saved and driver.poll() is None, (tmp_path / "output.txt").read_text()
            assert sum("RayTrainWorker" in line for line in ray.workers()) == 2  # one on either node, with a core each
        finally:
            driver.kill()
            driver.wait()
    assert wait_for(lambda: not ray.workers(), seconds=30), f"30 s later: {ray.workers()}"
    (left,) = leftovers(out)
    assert left.stat().st_mode & 0o777 == 0o700 and not (out / "result.json").exists()

    again = ended(arguments, ray.environment)
    assert again.returncode == 0, again.stderr
    assert not leftovers(out) and ray.nodes() == 2 and wait_for(lambda: not ray.workers(), seconds=30)
    train_two_ranks(run, without_ray)
    for name in ("history.json", "result.json"):
        assert (out / name).read_bytes() == (without_ray / name).read_bytes(), name


@pytest.mark.slow
def test_a_wrong_token_and_too_many_resources_are_one_line_errors(ray: TwoNodes, store: Path, tmp_path: Path) -> None:
    study, out = write_study(tmp_path / "study.yaml", store, executor="ray"), tmp_path / "out"
    arguments = ["tune", str(study), "--out", str(out), "--ray", ray.address]
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for environment, setting, reason in (
        (ray.environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "name=a", "RAY_AUTH_TOKEN_PATH"),
        (ray.stranger, "name=a", "RAY_AUTH_TOKEN_PATH"),
        (ray.environment, "sweep.resources.cpus=2", "has 2 core(s) on 2 nodes, at most 1 on one"),
    ):
        stderr = ended([*arguments, "--set", setting], environment)
        assert stderr.returncode == 2 and stderr.stdout == ""
        assert stderr.stderr.startswith("error: ") and stderr.stderr.count("\n") == 1 and reason in stderr.stderr, (
            stderr.stderr
        )
        assert not out.exists()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "127.0.0.1:1 ("),
        ("auto", "auto is not HOST:PORT"),
        ("ray://127.0.0.1:10001", "is not HOST:PORT"),
        ("127.0.0.1:99999", "is not HOST:PORT"),
        ("local", "local is not HOST:PORT"),
    ],
)
def test_an_address_without_ray_is_a_one_line_error(
    address: str, reason: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = write_study(tmp_path / "study.yaml", store, executor="ray"), tmp_path / "out"
    assert command(["tune", str(study), "--out", str(out), "--ray", address]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: --ray: ") and stderr.count("\n") == 1 and reason in stderr and not out.exists()


def test_a_server_other_than_ray_is_refused_before_ray_waits_for_it(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study.yaml", store, executor="ray")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert command(["tune", str(study), "--out", str(tmp_path / "out"), "--ray", address]) == 2
    assert f"{address};" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tune", "STUDY"], "sweep.executor=ray"),
        (["train", "RUN"], "--workers"),
    ],
)
def test_a_ray_address_that_would_not_be_used_is_refused(
    arguments: list[str], reason: str, store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study.yaml", store, executor="local")
    filled = [{"RUN": str(run), "STUDY": str(study)}.get(word, word) for word in arguments]
    assert command([*filled, "--out", str(tmp_path / "out"), "--ray", "127.0.0.1:1"]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_ray_of_another_version_is_refused_with_both_versions() -> None:
    code = "from ray._private.utils import check_version_info as check\n"
    code += "check({'ray_version': '2.9.0', 'python_version': '3.10.4'}, 'node a')"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    _, _, message = output.partition("RuntimeError: ")
    reason = connection_error(RuntimeError(message))
    assert "Ray 2.9.0 on Python 3.10.4" in reason and f"Ray {version('ray')} on Python" in reason


def test_folders_that_a_node_cannot_access_are_listed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    missing = str(tmp_path / "gone")
    assert inaccessible({str(tmp_path): os.R_OK | os.W_OK, missing: os.R_OK}) == [missing]
    if os.geteuid():
        assert inaccessible({str(closed): os.W_OK}) == [str(closed)]


def test_packs_are_distributed_over_nodes_and_each_fits_on_one() -> None:
    place = ExistingRay("a:1", (RayNode("1", "a", Node(4)), RayNode("2", "b", Node(2))))
    assert _shape(RayExecutor(Resources(), backend=place)) == (6, 1)
    assert _shape(RayExecutor(Resources(cpus=2), backend=place)) == (3, 2)
    assert _shape(RayExecutor(Resources(cpus=4), backend=place)) == (1, 4)
    assert _shape(RayExecutor(Resources(), backend=place, workers=3)) == (2, 1)
    with pytest.raises(ConfigError, match=r"5 requested, .* a:1 has 6 core"):
        RayExecutor(Resources(cpus=5), backend=place)
    with pytest.raises(ConfigError, match=r"7 of 1 thread\(s\) requested, .* a:1 has 6 core"):
        RayExecutor(Resources(), backend=place, workers=7)


def _shape(executor: RayExecutor) -> tuple[int, int]:
    return executor.slots, executor.threads
