"""Checks of the output folder, on this machine and between nodes."""

import json
import re
from pathlib import Path

import pytest

from modis_dist.cli.main import run
from modis_dist.integrations.doctor import checks as doctor
from modis_dist.integrations.doctor.all_reduce import AllReduceResult, RankResult
from modis_dist.runtime.finding import Finding


def test_a_node_that_gets_the_lock_of_another_is_named() -> None:
    hosts = {0: "a", 1: "b", 2: "c"}
    local = AllReduceResult(
        hosts, {0: RankResult("a"), 1: RankResult("b", excluded=False), 2: RankResult("c", excluded=True)}
    )
    (finding,) = doctor.locks_between(local, ["n1", "n2", "n3"])
    assert finding.level == "error" and re.match(r"n2 .*lock.* n1$", finding.message)
    assert "not localflock" in finding.fix
    assert doctor.locks_between(AllReduceResult(hosts, {0: RankResult("a")}), ["n1", "n2", "n3"]) == []


def test_the_output_folder_or_its_nearest_parent_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(doctor, "on_this_machine", lambda: Finding("all-reduce", "ok", "here"))
    (tmp_path / "runs").mkdir()
    for out in (tmp_path / "runs", tmp_path / "runs" / "mine" / "one"):
        run(["doctor", "--out", str(out), "--json"])
        levels = {finding["check"]: finding["level"] for finding in json.loads(capsys.readouterr().out)}
        assert levels["locks"] == levels["permissions"] == "ok"
    assert not list((tmp_path / "runs").iterdir())


def test_the_salloc_command_names_the_output_folder() -> None:
    finding = doctor.not_allocated(["--nodes=2"], "site.yaml", Path("/scratch/me"))
    assert "salloc --nodes=2 modis-dist doctor --cluster site.yaml --out /scratch/me" in finding.fix
