"""What the doctor finds of the folder that results go to, on this machine and between nodes."""

import json
from pathlib import Path

import pytest

from modis_dist.cli.main import run
from modis_dist.integrations.doctor import checks as doctor
from modis_dist.integrations.doctor.all_reduce import Answers, Done
from modis_dist.runtime.finding import Finding


def test_a_node_that_gets_the_lock_of_another_is_named_for_such_locks_hold_on_one_machine_only() -> None:
    came = {0: "a", 1: "b", 2: "c"}
    local = Answers(came, {0: Done("a"), 1: Done("b", kept_out=False), 2: Done("c", kept_out=True)})
    (found,) = doctor.locks_between(local, ["n1", "n2", "n3"])
    assert found.level == "bad" and found.found == "n2 got a lock that n1 held" and "not localflock" in found.advice
    assert doctor.locks_between(Answers(came, {0: Done("a")}), ["n1", "n2", "n3"]) == []


def test_the_folder_of_results_is_looked_at_be_it_there_or_yet_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(doctor, "on_this_machine", lambda: Finding("all-reduce", "good", "here"))
    (tmp_path / "runs").mkdir()
    for out in (tmp_path / "runs", tmp_path / "runs" / "mine" / "one"):
        run(["doctor", "--out", str(out), "--json"])
        told = {finding["what"]: finding["found"] for finding in json.loads(capsys.readouterr().out)}
        assert told["results"].startswith(f"{tmp_path}/runs is on ")
    assert not list((tmp_path / "runs").iterdir())


def test_the_nodes_of_a_profile_are_asked_about_the_folder_of_results() -> None:
    found = doctor.not_allocated(["--nodes=2"], "site.yaml", Path("/scratch/me"))
    assert "salloc --nodes=2 modis-dist doctor --cluster site.yaml --out /scratch/me" in found.advice
