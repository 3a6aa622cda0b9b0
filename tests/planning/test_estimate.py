"""Estimates of a dry run: wall time, disk, remaining trials; nothing is written."""

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modis_dist.cli.main import run as command
from modis_dist.config.study import Resources
from modis_dist.execution.local import LocalExecutor
from modis_dist.execution.memory import COPIES_OF_LAST, model_bytes
from modis_dist.execution.resources import cores
from modis_dist.model.networks import Shape
from modis_dist.planning import timing
from modis_dist.planning.estimate import scratch_use, wall_seconds
from modis_dist.planning.timing import seconds_per_row, seconds_per_step, shortest, timing_key
from modis_dist.runtime.errors import ConfigError
from modis_dist.train.checkpoint import save
from modis_dist.train.state import Setup, TrainState
from tests.study.toy_study import write_store, write_study
from tests.train import toy

SHAPE = Shape(dict(toy.SIZES), {m: (p, p // 2) for m, p in toy.SIZES.items()}, 4, 3, (16, 8), 0.8, 0.2)
LARGE = ["--set", "model.latent=256", "--set", "model.discriminator=[512, 256]", "--set", "optim.epochs=1"]


@given(st.lists(st.integers(1, 50), max_size=6), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_wall_time_is_at_most_a_third_above_the_best_schedule(lengths: list[int], slots: int) -> None:
    placements = product(range(slots), repeat=len(lengths))
    best = min(
        max(sum(s for s, at in zip(lengths, p, strict=True) if at == k) for k in range(slots)) for p in placements
    )
    seconds = wall_seconds([float(s) for s in lengths], slots=slots)
    assert best <= seconds <= best * 4 / 3 + 1e-9


def test_a_step_and_a_validated_row_take_some_time() -> None:
    runs = [toy.run(), toy.run("objective.adversarial_loss=published")]
    assert seconds_per_step(runs, SHAPE) > 0
    assert seconds_per_row(runs, SHAPE) > 0


@pytest.mark.parametrize(
    "setting",
    ["adversarial_loss=published", "penalty_outputs=each", "penalty_inputs=z", "penalty_weight=0"],
)
def test_stacks_with_other_losses_or_penalties_are_timed_separately(setting: str) -> None:
    assert timing_key([toy.run()], SHAPE) != timing_key([toy.run(f"objective.{setting}")], SHAPE)
    assert timing_key([toy.run()], SHAPE) == timing_key([toy.run("objective.beta=1")], SHAPE)


def test_the_estimated_disk_of_a_pack_is_the_size_of_its_last_checkpoint(tmp_path: Path) -> None:
    shape = Shape(dict.fromkeys(toy.SIZES, 100), dict.fromkeys(toy.SIZES, (100, 50)), 64, 3, (256, 128), 0.8, 0.2)
    configured = toy.run()
    state = TrainState.start(shape, range(2), Setup(configured.optim, toy.CPU))
    for optimiser in (state.adversary.optimiser, state.vaes.optimiser):
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    state.keep_best(0)
    saved = save(tmp_path, state.checkpoint(identity={}, machine={}, progress=[], sums=None))
    size = sum(file.stat().st_size for file in saved.iterdir())
    assert model_bytes(shape, slots=2) * COPIES_OF_LAST == pytest.approx(size, rel=0.2)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert command(["tune", *arguments, "--dry-run", "--json"]) == 0
    output: dict[str, Any] = json.loads(capsys.readouterr().out)
    return output


def test_the_plan_lists_trials_finished_or_not_and_the_size_of_their_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    study = [str(write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))), "--out", str(out), *LARGE]
    before = plan(capsys, *study)
    assert before["trials"] == len(before["trial_list"]) == 4 and before["done"] == 0 and not out.exists()
    assert {(t["params"]["objective.beta"], t["fold"]) for t in before["trial_list"]} == set(
        product((1e-4, 1e-2), (0, 1))
    )
    assert sum(p["trials"] for p in before["refit_packs"]) == 1
    assert before["seconds"] > sum(p["seconds"] for p in before["packs"])

    assert command(["tune", *study]) == 0
    size = sum(p.stat().st_size for p in out.glob("trials/*/best/step-*/*.safetensors"))
    assert sum(p["bytes"] for p in before["packs"] + before["refit_packs"]) == pytest.approx(size, rel=0.2)
    assert before["bytes"] > size

    files = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    after = plan(capsys, *study)
    assert after["done"] == 4 and after["packs"] == []
    next(out.glob(f"trials/{after['trial_list'][0]['id']}/result.json")).unlink()
    remaining = plan(capsys, *study)
    assert remaining["done"] == 3 and len(remaining["packs"]) == 1
    assert set(out.rglob("*")) == {p for p in files if p.exists()}


def test_a_dry_run_of_a_simulated_study_writes_nothing_to_an_existing_output_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    out.mkdir()
    file = tmp_path / "s.yaml"
    file.write_text(
        "data: {simulate: {samples: 60, classes: 3}}\nmodel: {latent: 4, ratios: [0.1], discriminator: [8]}\n"
        "optim: {epochs: 1}\nsweep: {executor: local, replicates: 23}\n"
    )
    assert command(["tune", str(file), "--out", str(out), "--dry-run"]) == 0
    stdout = capsys.readouterr().out
    assert "... and 3 more" in stdout and "training" in stdout and "seed 19" in stdout and "seed 20" not in stdout
    assert not list(out.iterdir())


def test_the_local_executor_uses_the_requested_cores_and_refuses_more_than_the_machine_has() -> None:
    assert LocalExecutor(Resources(cpus=1)).threads == 1
    with pytest.raises(ConfigError, match=rf"sweep\.resources\.cpus: {cores() + 1} .*\b{cores()}\b"):
        LocalExecutor(Resources(cpus=cores() + 1))


def test_later_search_rounds_are_counted_like_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, plans = write_store(tmp_path / "store"), {}
    for configurations in (2, 7):
        search = {"kind": "optuna", "configurations": configurations, "round_size": 2}
        sweep = {"grid": {}, "search": search, "space": {"objective.beta": {"low": 0.1, "high": 0.9}}}
        study = write_study(tmp_path / f"{configurations}.yaml", store, **sweep)
        plans[configurations] = plan(capsys, str(study), "--out", str(tmp_path / "out"), *LARGE)
    assert [plans[n]["trials"] for n in (2, 7)] == [4, 4] and [plans[n]["later_trials"] for n in (2, 7)] == [0, 10]
    of_round = sum(pack["bytes"] for pack in plans[2]["packs"])
    assert plans[7]["bytes"] - plans[2]["bytes"] == pytest.approx(2.5 * of_round)
    assert plans[7]["packs"][0]["steps_per_training"] == plans[2]["packs"][0]["steps_per_training"]


class Clock:
    """A clock that only the timed work advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(
    ("lengths", "turns", "expected"),
    [
        ([9.0, 0.5, 0.2, 0.3, 0.1, 0.4, 0.0], 2, 0.5),  # the warm-up alone exceeds the time limit
        ([1.0, 0.5, 0.2, 0.7, 0.0], 4, 0.2),
        ([1e-3, 5e-3, 2e-3, 4e-3, 3e-3, 6e-3, 0.0], 6, 2e-3),
        ([30.0, 40.0, 0.0], 2, 40.0),
    ],
)
def test_timing_has_a_warm_up_and_one_to_five_repeats(
    lengths: list[float], turns: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, remaining = Clock(monkeypatch), list(lengths)

    def work() -> None:
        clock.now += remaining.pop(0)

    assert shortest(work) == pytest.approx(expected)
    assert len(lengths) - len(remaining) == turns


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_study_for_a_gpu_cluster_is_estimated_on_a_machine_without_gpu_which_tune_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = str(write_study(tmp_path / "study.yaml", write_store(tmp_path / "store")))
    profile = tmp_path / "gpu.yaml"
    profile.write_text("gpus: 1\n")
    gpu = ["--set", "trainer.device=cuda", "--set", "trainer.precision=fp16"]
    arguments = ["--cluster", str(profile), "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    capsys.readouterr()
    assert command(["submit", study, *arguments, *gpu]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["gpu_hours"] is None and estimate["measured_on"] == "this machine's CPU"
    assert (
        plan(capsys, study, "--out", str(tmp_path / "out"))["packs"][0]["steps_per_training"]
        == estimate["packs"][0]["steps_per_training"]
    )
    assert command(["tune", study, "--out", str(tmp_path / "out"), "--dry-run", *gpu]) == 2
    assert re.search(r"\bcuda\b.*\b0 GPU", capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_the_dry_run_shows_features_on_disk_and_warns_if_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = str(write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), packing={"enabled": False}))
    words = [study, "--out", str(tmp_path / "out"), *LARGE]
    assert plan(capsys, *words)["scratch"] == 0, "features are in memory"
    words += ["--set", "trainer.feature_storage=disk"]
    output = plan(capsys, *words)
    sizes = [row["scratch"] for row in output["packs"] + output["refit_packs"]]
    assert len(sizes) == 5 and output["scratch"] == max(sizes) > min(sizes) > 0 and output["scratch_problem"] is None
    for free, message in ((max(sizes), "(TMPDIR)"), (1, "warning: ")):
        monkeypatch.setattr(psutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert command(["tune", *words, "--dry-run"]) == 0
        assert [message in line for line in capsys.readouterr().out.splitlines()].count(True) == 1


@pytest.mark.parametrize(("free", "fewer"), [(40_000, None), (39_999, True), (29_999, False)])
def test_parallel_packs_need_disk_for_the_features_of_all_of_them(
    monkeypatch: pytest.MonkeyPatch, free: int, fewer: bool | None
) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    stages = [[20_000, 7, 20_000, 5], [30_000], []]
    peak, problem = scratch_use(stages, slots=(2, 1, 2), on_this_machine=True)
    assert peak == 40_000 and (problem is None) is (fewer is None)
    assert ("sweep.resources" in (problem or "")) is bool(fewer)
    assert scratch_use([[20_000], [30_000], []], slots=(2, 1, 2), on_this_machine=False) == (30_000, None)
