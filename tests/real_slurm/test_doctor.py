"""doctor on a real Slurm: on the login node, and on all nodes of an allocation."""

import json
from pathlib import Path

import pytest

from modis_dist.config.cluster import load_site
from modis_dist.integrations.slurm.job_script import requests
from modis_dist.integrations.slurm.slurm_commands import check_request
from tests.real_slurm.cluster import Cluster
from tests.real_slurm.studies import command, write_profile
from tests.study.toy_study import COMMAND

pytestmark = pytest.mark.slurm


def findings(text: str) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in json.loads(text)}


def test_a_suitable_profile_has_no_errors_and_the_nodes_of_an_allocation_all_reduce(
    in_cluster: Cluster, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path / "profile.yaml", nodes=2)
    checks = findings(command("doctor", "--cluster", str(profile), "--json"))
    assert not [finding for finding in checks.values() if finding["level"] == "error"]
    assert checks["sbatch --test-only"]["level"] == "ok"
    assert checks["all-reduce"]["level"] == "warning" and "salloc" in checks["all-reduce"]["fix"]
    nodes = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--partition=low", "--mem=1200M"]
    checks = findings(in_cluster.run(*nodes, *COMMAND, "doctor", "--cluster", str(profile), "--json"))
    assert checks["all-reduce"]["level"] == "ok" and "n1, n2" in checks["all-reduce"]["message"]
    assert checks["locks between nodes"]["level"] == "ok" and "n2" in checks["locks between nodes"]["message"]


REFUSED = {
    "partition": {"partition": "nowhere"},
    "nodes": {"nodes": 3},
    "memory": {"memory": "1T"},
    "cpus": {"cpus": 64},
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.usefixtures("in_cluster")
def test_a_job_that_the_cluster_would_refuse_is_an_error(key: str, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "profile.yaml", **REFUSED[key])
    finding = check_request(requests(load_site(profile), nodes=load_site(profile).nodes))
    assert finding.level == "error" and finding.message


@pytest.mark.usefixtures("in_cluster")
def test_sbatch_test_only_refuses_an_array_above_maxarraysize(tmp_path: Path) -> None:
    site = load_site(write_profile(tmp_path / "profile.yaml"))
    array = requests(site, nodes=1)
    assert check_request([*array, "--array=0-999"]).level == "ok"
    assert check_request([*array, "--array=0-99999"]).level == "error"
