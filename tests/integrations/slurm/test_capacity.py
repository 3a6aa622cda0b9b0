"""Checks of a study against memory, GPU memory and time limit of a profile, before it is submitted."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.integrations.slurm.capacity import check_capacity, check_saving
from modis_dist.planning import timing
from modis_dist.study.plan import plan
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.integrations.slurm.toy_submission import SINGLE, site, study
from tests.study.toy_study import write_study

STACKED: dict[str, Any] = {"packing": {"max_trials": 4}, "probe": False}
LARGE = ["--set", "model.latent=512", "--set", "model.discriminator=[4096, 4096]"]


def submit(tmp_path: Path, store: Path, *options: str, sweep: dict[str, Any] = STACKED, **keys: Any) -> int:
    file, profile = write_study(tmp_path / "study.yaml", store, **sweep), tmp_path / "site.yaml"
    profile.write_text(yaml12.dump({"cpus": 1, "array_parallelism": 1} | keys))
    return command(["submit", str(file), "--cluster", str(profile), "--out", str(tmp_path / "out"), *options])


def test_a_study_whose_packs_do_not_fit_the_memory_of_a_job_is_refused_before_anything_is_written(
    slurm: FakeSlurm, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path, store, memory="1M") == 2
    stderr = capsys.readouterr().err
    assert re.search(r"cluster\.memory: .*\b0\.7 GB .*\b4 .*\b1M\b", stderr)
    assert not (tmp_path / "out").exists() and not slurm.jobs
    assert submit(tmp_path, store, memory="2G") == 0


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_shows_the_memory_of_every_pack_and_a_smaller_stack_that_fits(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path, store, *LARGE, "--dry-run", "--json", memory="2G") == 0
    output = json.loads(capsys.readouterr().out)
    (pack,) = output["packs"]
    assert pack["memory"] > 2 * 2**30 and pack["gpu_memory"] == 0
    (memory_finding,) = [finding for finding in output["findings"] if finding["check"] == "memory of a pack"]
    assert memory_finding["level"] == "error" and "or set sweep.packing.max_trials: 2" in memory_finding["fix"]


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_shows_features_on_the_disk_of_nodes_with_little_memory(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modis_dist.train.placement.FEATURES_FRACTION", 0.01)  # the toy data are small
    storage = {}
    for memory in ("2G", "1M"):
        assert submit(tmp_path, store, "--dry-run", "--json", memory=memory) == 0
        storage[memory] = json.loads(capsys.readouterr().out)["scratch"]
    assert storage["2G"] == 0 < storage["1M"]
    assert submit(tmp_path, store, "--dry-run", memory="1M") == 0
    assert "Features in temporary folders: " in capsys.readouterr().out


def test_more_memory_than_a_small_gpu_has_is_a_warning(
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


def test_a_checkpoint_slower_than_warning_s_is_a_warning_with_a_better_value() -> None:
    assert check_saving(50.0, site(warning_s=120)).level == "ok"
    finding = check_saving(100.0, site(warning_s=120))
    assert finding.level == "warning" and "warning_s: 210" in finding.fix


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without a GPU on which only checkpoints take time, 100 s each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "seconds_per_step", lambda *_: 0.0)
    monkeypatch.setattr(timing, "seconds_per_row", lambda *_: 0.0)
    monkeypatch.setattr(timing, "seconds_per_save", lambda *_: 100.0)
    monkeypatch.setattr("modis_dist.train.prepare.perf_counter", lambda: 0.0)


@pytest.mark.usefixtures("slurm", "slow")
def test_checkpoints_are_counted_and_an_array_trains_refits_one_by_one(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry-run", "--json", "--set", "trainer.checkpoint_every=1", "--set", "optim.epochs=3"]
    sweep = SINGLE | {"replicates": 2}
    assert submit(tmp_path, store, *words, sweep=sweep, array_parallelism=100) == 0
    output = json.loads(capsys.readouterr().out)
    assert [row["seconds"] for row in output["packs"]] == [300.0] * 8, "three checkpoints of each"
    assert output["refit_seconds"] == 600 and output["seconds"] == 300 + 600, "all at once, then two refits"
    assert {finding["check"]: finding["level"] for finding in output["findings"]}["time to save"] == "warning"


@pytest.mark.usefixtures("slurm", "slow")
def test_the_job_that_exceeds_the_time_limit_is_named_also_if_it_is_the_refit(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, words = SINGLE | {"replicates": 2}, ["--dry-run", "--set", "optim.epochs=1"]
    assert submit(tmp_path, store, *words, sweep=sweep, time="00:02:30") == 0
    assert re.search(r"\(refit\).*\b3 min\b.*\b00:02:30\b", capsys.readouterr().out)
    assert submit(tmp_path, store, *words, "--json", "--form", "allocation", sweep=sweep, cpus=8) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["longest_job"], output["longest_s"]) == ("the job", output["seconds"])
