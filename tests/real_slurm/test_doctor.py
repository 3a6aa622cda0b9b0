"""The doctor on a real Slurm: asked on the login node, and by all nodes of an allocation."""

import json
from pathlib import Path

import pytest

from tests.real_slurm.cluster import Cluster
from tests.real_slurm.studies import command, write_profile
from tests.study.toy_study import COMMAND

pytestmark = pytest.mark.slurm


def findings(text: str) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(text)}


def test_all_is_well_with_a_profile_that_suits_and_the_nodes_of_an_allocation_sum_together(
    in_cluster: Cluster, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path / "profile.yaml", nodes=2)
    told = findings(command("doctor", "--cluster", str(profile), "--json"))
    assert not [finding for finding in told.values() if finding["level"] == "bad"]
    assert told["nodes of low"]["found"] == "2 of 2 have 1 cores and 1200M, 2 needed"
    assert told["all-reduce"]["level"] == "warning" and "salloc" in told["all-reduce"]["advice"]
    nodes = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--partition=low", "--mem=1200M"]
    told = findings(in_cluster.run(*nodes, *COMMAND, "doctor", "--cluster", str(profile), "--json"))
    assert told["all-reduce"]["level"] == "good" and "n1, n2" in told["all-reduce"]["found"]
    assert told["locks between nodes"]["found"] == "n2 kept out by n1"


@pytest.mark.usefixtures("in_cluster")
def test_what_a_cluster_would_refuse_is_found_before_anything_is_sent(tmp_path: Path) -> None:
    asked = {"partition": "nowhere", "max_array": 100_000}
    profile = write_profile(tmp_path / "profile.yaml", **asked)
    told = findings(command("doctor", "--cluster", str(profile), "--json", code=3))
    bad = {what for what, finding in told.items() if finding["level"] == "bad"}
    assert {"partition nowhere", "arrays", "a job"} <= bad
    assert "invalid partition" in told["a job"]["found"].lower()
