"""Whether a study finds room on the nodes of a profile, in memory and in time, as it is told before it is submitted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.integrations.slurm.capacity import check_capacity, check_saving
from modis_dist.planning import probe
from modis_dist.study.plan import plan
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.integrations.slurm.toy_submission import SINGLE, site, study
from tests.study.toy_study import write_study

STACKED: dict[str, Any] = {"packing": {"max_trials": 4}, "probe": False}
LARGE = ["--set", "model.latent=512", "--set", "model.discriminator=[4096, 4096]"]


def asked(tmp_path: Path, store: Path, *options: str, sweep: dict[str, Any] = STACKED, **keys: Any) -> int:
    file, profile = write_study(tmp_path / "study.yaml", store, **sweep), tmp_path / "site.yaml"
    profile.write_text(yaml12.dump({"cpus": 1, "at_once": 1} | keys))
    return command(["submit", str(file), "--cluster", str(profile), "--out", str(tmp_path / "out"), *options])


def test_a_study_whose_packs_do_not_fit_the_memory_of_a_job_is_refused_before_anything_is_written(
    slurm: FakeSlurm, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(tmp_path, store, memory="1M") == 2
    said = capsys.readouterr().err
    assert "cluster.memory: about 0.7 GB for 4 stacked trials, a job has 1M; " in said
    assert not (tmp_path / "out").exists() and not slurm.jobs
    assert asked(tmp_path, store, memory="2G") == 0


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_tells_the_memory_of_every_pack_and_that_a_stack_of_fewer_trials_would_fit(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(tmp_path, store, *LARGE, "--dry-run", "--json", memory="2G") == 0
    told = json.loads(capsys.readouterr().out)
    (pack,) = told["packs"]
    assert pack["memory"] > 2 * 2**30 and pack["gpu_memory"] == 0
    (found,) = [finding for finding in told["findings"] if finding["check"] == "memory of a pack"]
    assert found["level"] == "error" and "or set sweep.packing.max_trials: 2" in found["fix"]


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_tells_what_features_take_of_the_disk_of_nodes_whose_memory_is_too_small_for_them(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modis_dist.train.placement.SHARE", 0.01)  # the toy data are small
    kept = {}
    for memory in ("2G", "1M"):
        assert asked(tmp_path, store, "--dry-run", "--json", memory=memory) == 0
        kept[memory] = json.loads(capsys.readouterr().out)["scratch"]
    assert kept["2G"] == 0 < kept["1M"]
    assert asked(tmp_path, store, "--dry-run", memory="1M") == 0
    assert "Features in temporary folders: " in capsys.readouterr().out


def test_what_a_pack_takes_of_a_gpu_is_told_and_too_much_for_a_small_one_is_a_warning(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(study(store, **STACKED), out=tmp_path, slots=1, source="study.yaml", gpu=False)
    node, gpu = check_capacity(planned, site(gpus=1))
    assert (node.level, gpu.level) == ("ok", "ok") and gpu.message.startswith("about 0.6 GB ")
    monkeypatch.setattr("modis_dist.integrations.slurm.capacity.SMALL_GPU", 640 * 2**20)
    shapes = {name: replace(shape, discriminator=(2048, 2048)) for name, shape in planned.shapes.items()}
    gpu = check_capacity(replace(planned, shapes=shapes), site(gpus=1))[1]
    assert gpu.level == "warning" and "gpu_kind or constraint" in gpu.fix
    assert check_capacity(planned, site(executor="local", memory="1M")) == []


def test_a_checkpoint_that_takes_longer_than_the_warning_before_the_limit_is_told_with_a_longer_one() -> None:
    assert check_saving(50.0, site(warning_s=120)).level == "ok"
    found = check_saving(100.0, site(warning_s=120))
    assert found.level == "warning" and "warning_s: 210" in found.fix


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, on which only checkpoints take time, 100 s each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe, "seconds_per_step", lambda *_: 0.0)
    monkeypatch.setattr(probe, "seconds_per_row", lambda *_: 0.0)
    monkeypatch.setattr(probe, "seconds_per_save", lambda *_: 100.0)
    monkeypatch.setattr("modis_dist.train.prepare.perf_counter", lambda: 0.0)


@pytest.mark.usefixtures("slurm", "slow")
def test_checkpoints_count_and_refits_of_an_array_are_trained_one_after_the_other(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry-run", "--json", "--set", "trainer.checkpoint_every=1", "--set", "optim.epochs=3"]
    sweep = SINGLE | {"replicates": 2}
    assert asked(tmp_path, store, *words, sweep=sweep, at_once=100) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["seconds"] for row in told["packs"]] == [300.0] * 8, "three checkpoints of each"
    assert told["refit_seconds"] == 600 and told["seconds"] == 300 + 600, "all at once, then two refits"
    assert {finding["check"]: finding["level"] for finding in told["findings"]}["time to save"] == "warning"


@pytest.mark.usefixtures("slurm", "slow")
def test_the_job_that_a_time_limit_stops_most_often_is_told_be_it_the_last_one_with_all_refits(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, words = SINGLE | {"replicates": 2}, ["--dry-run", "--set", "optim.epochs=1"]
    assert asked(tmp_path, store, *words, sweep=sweep, time="00:02:30") == 0
    assert "time limit: the last job (refit) takes 3 min, time is 00:02:30" in capsys.readouterr().out
    assert asked(tmp_path, store, *words, "--json", "--form", "allocation", sweep=sweep, cpus=8) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["longest_job"], told["longest_s"]) == ("the job", told["seconds"])
