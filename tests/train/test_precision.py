"""Networks in bf16 and fp16: parts in full precision, scaled losses, skipped steps, resume, several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from modis_dist import objective
from modis_dist.distributed import World
from modis_dist.execution.run_pack import chosen_device
from modis_dist.objective import Rules, adversary_phase, vae_phase
from modis_dist.runtime.errors import ConfigError, Interrupted
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.learner import Learner
from modis_dist.train.loop import fit
from modis_dist.train.state import Setup, TrainState
from tests.devices import DEVICES, SINGLE_RANK
from tests.numeric.toy_system import OPTIM, SHAPE, batch, weights
from tests.ranks import on_ranks
from tests.train import toy
from tests.train.test_loop import StopAt


def single(tensors: Any) -> Any:
    """Return the same values in float32."""
    moved = {}
    for name, value in vars(tensors).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.float()
        if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            value = tuple(part.float() for part in value)
        moved[name] = value
    return type(tensors)(**moved)


def phases(lower: torch.dtype | None, *, penalty_weight: float = 3.0) -> dict[str, torch.Tensor]:
    """Return every term of both phases of a step, with networks in float32 or lower precision."""
    state = TrainState.start(SHAPE, [1], Setup(OPTIM, toy.CPU))
    inputs, loss_weights = single(batch(rows=32)), weights(penalty_weight=penalty_weight, dtype=torch.float32)
    terms = [
        phase(state.model, inputs, loss_weights, Rules(autocast_dtype=lower)) for phase in (adversary_phase, vae_phase)
    ]
    assert all(part.dtype == torch.float32 for term in terms for part in term.parts.values())
    return {name: part for term in terms for name, part in term.parts.items()}


@pytest.mark.parametrize(("lower", "close"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_lower_precision_changes_network_losses_slightly_and_those_of_the_penalised_discriminator_not_at_all(
    lower: torch.dtype, close: float
) -> None:
    full, lowered = phases(None), phases(lower)
    for name, value in full.items():
        if name == "penalty" or name.endswith("_d"):
            assert torch.equal(lowered[name], value), name
        else:
            torch.testing.assert_close(lowered[name], value, rtol=close, atol=close)
    assert any(not torch.equal(lowered[name], full[name]) for name in ("reconstruction", "kl"))


def test_without_a_penalty_the_discriminator_also_runs_in_lower_precision() -> None:
    full, lowered = phases(None, penalty_weight=0.0), phases(torch.bfloat16, penalty_weight=0.0)
    assert not torch.equal(lowered["class_d"], full["class_d"])


def test_losses_are_computed_outside_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(probability: torch.Tensor, h: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((probability.dtype, h.dtype, torch.is_autocast_enabled("cpu")))
        return h.sum((-1, -2)) * 0

    monkeypatch.setattr(objective, "clustering", spy)
    phases(torch.bfloat16, penalty_weight=0.0)
    assert seen == [(torch.float32, torch.float32, False)] * 2


def train(world: World, folder: Path, precision: str, stop: int = 0, device: str = "cpu") -> list[Any]:
    settings = (f"trainer.precision={precision}", "trainer.log_every=1", "optim.epochs=3")
    callbacks = Callbacks(stop=StopAt(stop)) if stop else Callbacks()
    members = [toy.member("t", toy.run(*settings), folder)]
    try:
        return [
            p.history
            for p in fit(members, folder=folder, device=torch.device(device), callbacks=callbacks, world=world)
        ]
    except Interrupted as interruption:
        return [str(interruption)]


def last(folder: Path) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load(checkpoint.newest(folder / "last"))
    return {f"{part}/{name}": t for part, tensors in loaded.tensors.items() for name, t in tensors.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_in_lower_precision_resumes_bit_identically_with_parameters_in_float32(
    precision: str, device: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    expected = train(World(), uninterrupted, precision, 0, device)
    assert "stop requested" in train(World(), stopped, precision, 8, device)[0]
    assert train(World(), stopped, precision, 0, device) == expected
    want, got = last(uninterrupted), last(stopped)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert {tensor.dtype for tensor in want.values()} == {torch.float32}


def overflowing(world: World, folder: Path, steps: int, device: str = "cpu") -> Any:
    """Train in fp16; on the second rank, the gradients of the VAEs overflow in the first ``steps`` steps."""
    phase, calls = Learner.learn, 0

    def with_overflow(self: Learner, inputs: Any, loss_weights: Any, rules: Any) -> Any:
        nonlocal calls
        if "0.mu.weight" in dict(self.networks.named_parameters()):  # the VAEs
            calls += 1
            if world.rank == world.size - 1 and calls <= steps:
                handle = next(self.networks.parameters()).register_hook(lambda gradient: gradient * float("inf"))
                try:
                    return phase(self, inputs, loss_weights, rules)
                finally:
                    handle.remove()
        return phase(self, inputs, loss_weights, rules)

    Learner.learn = with_overflow  # type: ignore[method-assign]
    try:
        members = [toy.member("t", toy.run("trainer.precision=fp16", "optim.epochs=2"), folder)]
        (progress,) = fit(members, folder=folder, device=torch.device(device), world=world)
    finally:
        Learner.learn = phase  # type: ignore[method-assign]
    return progress.status, progress.reason, progress.history


@pytest.mark.parametrize("ranks", [*SINGLE_RANK, (2, "cpu")])
def test_steps_whose_gradients_overflow_on_one_rank_are_skipped_counted_and_the_scale_is_lowered(
    ranks: tuple[int, str], tmp_path: Path
) -> None:
    size, device = ranks
    histories = on_ranks(size, overflowing, tmp_path, 2, device, device=device)
    assert all(rank == histories[0] for rank in histories)
    status, _, history = histories[0]
    assert status == "done" and [row["train/skipped_g"] for row in history] == [2.0, 2.0]
    assert [row["train/skipped_d"] for row in history] == [0.0, 0.0]
    loaded = checkpoint.load(checkpoint.newest(tmp_path / "last")).state
    assert loaded["learners"]["vaes"]["steps"] == loaded["updates"] - 2
    scales = {name: learner["scaler"]["scale"] for name, learner in loaded["learners"].items()}
    assert scales["vaes"] == scales["discriminator"] / 4


def test_an_epoch_of_skipped_steps_fails_the_training_with_the_reason(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    status, reason, _ = overflowing(World(), tmp_path, 10**6)
    assert status == "failed" and "skipped_g" in reason and "trainer.precision" in reason


def test_fp16_without_a_gpu_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision"):
        chosen_device(toy.run("trainer.precision=fp16", "trainer.device=cpu"))


@pytest.mark.parametrize("slots", [1, 3])
def test_gradients_in_bf16_equal_full_precision_up_to_the_rounding_of_bf16(slots: int) -> None:
    gradients = []
    for lower in (None, torch.bfloat16):
        state = TrainState.start(SHAPE, range(slots), Setup(OPTIM, toy.CPU))
        inputs = single(batch(rows=32, slots=slots))
        loss_weights = weights(["pairwise"] * slots, dtype=torch.float32)
        parameters = list(state.model.vaes.parameters())
        vae_phase(state.model, inputs, loss_weights, Rules(autocast_dtype=lower)).loss.sum().backward(inputs=parameters)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
        gradients.append(torch.cat([p.grad.flatten(1) for p in parameters if p.grad is not None], 1))
    full, lowered = gradients
    assert ((lowered - full).norm(dim=1) < 0.05 * full.norm(dim=1)).all()
    assert not torch.equal(full, lowered)
