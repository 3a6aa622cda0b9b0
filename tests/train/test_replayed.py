"""Trainings with captured and replayed steps, as CUDA graphs on a GPU and with a stand-in on the CPU."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modis_dist.config.run import Run
from modis_dist.objective import Rules
from modis_dist.train import checkpoint, learner
from modis_dist.train.cuda_graph import WARM_UP
from modis_dist.train.loop import fit
from modis_dist.train.prepare import prepare
from modis_dist.train.progress import Progress
from modis_dist.train.state import Setup, TrainState
from tests.devices import DEVICES
from tests.numeric.toy_system import KINDS, OPTIM, SHAPE, batch, moved, step, weights
from tests.train import toy
from tests.train.captures import Graphs, Replays

FINE = "optim.lr=0.0009765625"  # a power of two: exact in float32, in which a captured step reads it


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device with its index, as in ``Tensor.device``."""
    torch.set_num_threads(1)
    return torch.zeros(1, device=request.param).device


@pytest.fixture
def capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs | Replays]:
    """Use one counted capture for every learner of the test; no capture may fail."""
    made = Graphs(device) if device.type == "cuda" else Replays()
    monkeypatch.setattr(learner, "capture_for", lambda _: made)
    yield made
    assert not made.failed


def trained(
    folder: Path, runs: Sequence[Run], device: torch.device, *, dtype: torch.dtype = torch.float64
) -> tuple[list[Progress], dict[str, Tensor]]:
    """Return a stack's progress and last model; in float64, as Adam amplifies rounding errors of zero gradients."""
    members = [toy.member(f"t{number}", run, folder) for number, run in enumerate(runs)]
    progress = fit(members, folder=folder, device=device, dtype=dtype)
    return progress, checkpoint.load(checkpoint.newest(folder / "last")).tensors["model"]


def last_losses(progress: Progress) -> dict[str, float]:
    return {name: value for name, value in progress.history[-1].items() if name.startswith("train/")}


STACKS = {
    "one": [()],
    "falling rate": [("optim.lr_schedule=cosine", "optim.epochs=6")],
    "a sign for each modality": [("objective.penalty_outputs=each",)],
    "penalty on latents": [("objective.penalty_inputs=z",)],
    "a loss for each": [(f"seed={seed}", f"objective.adversarial_loss={kind}") for seed, kind in enumerate(KINDS)],
    "without penalty": [(f"seed={seed}", "objective.penalty_weight=0") for seed in range(2)],
}


@pytest.mark.parametrize("settings", STACKS.values(), ids=STACKS)
def test_a_training_captures_each_learner_once_and_equals_one_without_capture(
    settings: list[tuple[str, ...]],
    device: torch.device,
    capture: Graphs | Replays,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [toy.run(FINE, *overrides) for overrides in settings]
    progress, model = trained(tmp_path / "captured", runs, device)
    steps = checkpoint.load(checkpoint.newest(tmp_path / "captured" / "last")).state["updates"]
    assert (capture.captured, capture.warmed_up, capture.replayed) == (2, 2 * WARM_UP, 2 * (steps - WARM_UP))

    monkeypatch.setattr(learner, "capture_for", lambda _: None)
    expected, expected_model = trained(tmp_path / "direct", runs, device)
    assert capture.captured == 2
    for member, expected_member in zip(progress, expected, strict=True):
        assert last_losses(member) == pytest.approx(last_losses(expected_member), rel=1e-5, abs=1e-6)
    for name, tensor in expected_model.items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_stack_that_shrinks_is_captured_again_and_remaining_members_equal_single_trainings(
    device: torch.device, capture: Graphs | Replays, tmp_path: Path
) -> None:
    good, bad = (toy.run(f"seed={seed}", "trainer.log_every=6") for seed in (1, 2))
    broken = prepare(bad, toy.cohort())
    broken.train.x["cnv"][:] = 1e30  # finite, but its square is not
    members = [toy.member("good", good, tmp_path), toy.member("bad", bad, tmp_path, prepared=broken)]
    stays, leaves = fit(members, folder=tmp_path, device=device)
    assert (stays.status, leaves.status) == ("done", "failed")
    assert (capture.captured, capture.warmed_up) == (4, 4 * WARM_UP)
    (alone,), _ = trained(tmp_path / "alone", [good], device, dtype=torch.float32)
    assert last_losses(alone)["train/total_g"] == pytest.approx(last_losses(stays)["train/total_g"], rel=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_captured_training_in_lower_precision_is_close_to_one_in_fp32(
    precision: str, device: torch.device, capture: Graphs | Replays, tmp_path: Path
) -> None:
    runs = [toy.run(f"trainer.precision={name}", "optim.epochs=6") for name in ("fp32", precision)]
    results = [trained(tmp_path / run.trainer.precision, [run], device, dtype=torch.float32)[0][0] for run in runs]
    assert capture.captured == 4
    full, lower = (last_losses(progress)["train/total_g"] for progress in results)
    assert lower == pytest.approx(full, rel=0.1)


def test_a_replayed_step_whose_gradients_overflow_changes_no_parameter_and_halves_the_scale(
    device: torch.device, capture: Graphs | Replays
) -> None:
    state = TrainState.start(SHAPE, [1], Setup(OPTIM, device, scaled=True))
    loss_weights, rules = moved(weights(dtype=torch.float32), device), Rules(autocast_dtype=torch.float16)

    def run_step(number: int) -> None:
        inputs = batch(number)
        single = replace(inputs, x=tuple(x.float() for x in inputs.x))
        single = replace(single, noise_d=inputs.noise_d.float(), noise_g=inputs.noise_g.float())
        step(state, moved(single, device), loss_weights, rules)

    for number in range(WARM_UP + 2):
        run_step(number)
    sides = (state.adversary, state.vaes)
    for side in sides:
        side.scaler.update(2.0**127)  # in place: a captured step reads it
    replayed, steps = capture.replayed, [side.steps() for side in sides]
    before = [parameter.clone() for parameter in state.model.parameters()]
    run_step(9)
    assert capture.replayed == replayed + 2
    assert all(torch.equal(*pair) for pair in zip(before, state.model.parameters(), strict=True))
    assert [side.steps() for side in sides] == steps
    assert [side.scaler.get_scale() for side in sides] == [2.0**126] * 2
    for side in sides:
        side.scaler.update(2.0**10)
    run_step(10)
    assert capture.replayed == replayed + 4 and [side.steps() for side in sides] == [number + 1 for number in steps]
    assert not all(torch.equal(*pair) for pair in zip(before, state.model.parameters(), strict=True))


def test_a_new_learning_rate_applies_to_the_next_replayed_step(device: torch.device, capture: Graphs | Replays) -> None:
    state = TrainState.start(SHAPE, [1], Setup(OPTIM, device, torch.float64))
    loss_weights, inputs = moved(weights(), device), moved(batch(), device)
    for _ in range(WARM_UP + 1):
        step(state, inputs, loss_weights, Rules())
    state.set_rates(0.0)
    before = [parameter.clone() for parameter in state.model.parameters()]
    step(state, inputs, loss_weights, Rules())
    assert capture.replayed == 4
    assert all(torch.equal(*pair) for pair in zip(before, state.model.parameters(), strict=True))


def test_terms_of_a_replayed_step_belong_to_its_own_batch_for_both_learners(
    device: torch.device, capture: Graphs | Replays
) -> None:
    state, twin = (TrainState.start(SHAPE, [1], Setup(OPTIM, device, torch.float64)) for _ in range(2))
    loss_weights = moved(weights(), device)
    for number in range(WARM_UP + 3):
        inputs = moved(batch(number), device)
        for side in (twin.adversary, twin.vaes):
            side.invalidate_graph()
        for replayed, expected in zip(
            step(state, inputs, loss_weights, Rules()), step(twin, inputs, loss_weights, Rules()), strict=True
        ):
            for name, value in expected.parts.items():
                torch.testing.assert_close(replayed.parts[name], value, rtol=1e-7, atol=1e-9, msg=f"{number} {name}")
    assert capture.replayed == 2 * 3
