"""The result of a slot does not depend on the other slots of its stack."""

from dataclasses import fields, replace

import pytest
import torch

from modis_dist.objective import Batch, Rules, Weights
from modis_dist.train.loader import Loader
from modis_dist.train.prepare import Prepared
from modis_dist.train.state import TrainState
from tests.numeric.toy_system import CPU, KINDS, OPTIM, ROWS, SHAPE, batch, prepared, start, step, weights

SEEDS = [3, 1, 4, 1, 5, 9, 2, 6]
STEPS = 10
EACH_ON_Z = Rules(kl_reduction="mean", penalty_outputs="each", penalty_inputs="z")


def folds() -> list[Prepared]:
    """Return training rows of eight slots: four sets of different lengths, each for two slots."""
    sets = [prepared({"a": 20 + n, "b": 19, "c": 23 - n}, seed=n) for n in range(4)]
    return [sets[r // 2] for r in range(8)]


def mixed(dtype: torch.dtype) -> Weights:
    """Return weights that differ between slots in everything that may differ."""
    spread = torch.arange(1, 9, dtype=dtype)
    return Weights(
        beta=0.01 * spread,
        adversarial=spread / 4,
        penalty_weight=torch.tensor([0.0, 1, 2, 3, 0, 5, 6, 7], dtype=dtype),
        classification=spread.flip(0) / 4,
        clustering=spread.sqrt() / 2,
        pseudo_label_threshold=0.3 + spread / 50,
        prior=(torch.eye(3, dtype=dtype).repeat(3, 1)[:8] + 0.5) / 2.5,
        losses=KINDS + KINDS[::-1],
    )


def trained(members: list[int], rules: Rules, dtype: torch.dtype) -> TrainState:
    """Train some of the eight slots for ten steps."""
    data, loss_weights = folds(), mixed(dtype)
    stack = Weights(
        *(
            tuple(loss_weights.losses[r] for r in members)
            if field.name == "losses"
            else getattr(loss_weights, field.name)[members]
            for field in fields(loss_weights)
        )
    )
    loader = Loader(
        [data[r] for r in members],
        [SEEDS[r] for r in members],
        batch_size=ROWS,
        epoch_length="shortest",
        min_labelled_fraction=0.25,
        latent=SHAPE.latent,
        signs=rules.penalty_outputs == "each",
        device=CPU,
        dtype=dtype,
    )
    state = start([SEEDS[r] for r in members], dtype=dtype)
    for number in range(STEPS):
        epoch, at = divmod(number, loader.steps)
        step(state, loader.batch(epoch=epoch, step=at), stack, rules)
    return state


def undetermined(name: str) -> bool:
    """Return True if the exact gradient of a tensor is zero, so that Adam follows rounding errors.

    Batch normalisation cancels the bias before it (the running mean follows that bias), and a constant added to a
    critic does not change a relativistic loss.
    """
    before_norm = name.startswith("vaes") and name.endswith(".linear.bias")
    return before_norm or name.endswith("running_mean") or name == "discriminator.modality.bias"


@pytest.mark.parametrize(("rules", "members"), [(Rules(), [0, 2, 5, 7]), (EACH_ON_Z, [1, 3, 4, 6])])
def test_a_slot_trained_alone_equals_its_slice_of_a_stack_of_eight(rules: Rules, members: list[int]) -> None:
    stack = trained(list(range(8)), rules, torch.float64).tensors()
    for r in members:
        for part, tensors in trained([r], rules, torch.float64).tensors().items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(stack[part][name][r : r + 1], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("rules", "members"), [(Rules(), [1, 6]), (EACH_ON_Z, [2, 7])])
def test_in_float32_a_slot_trained_alone_equals_its_slice_up_to_rounding(rules: Rules, members: list[int]) -> None:
    stack = trained(list(range(8)), rules, torch.float32).tensors()
    furthest = 2 * STEPS * (OPTIM.lr_discriminator or OPTIM.lr)
    for r in members:
        for part, tensors in trained([r], rules, torch.float32).tensors().items():
            for name, tensor in tensors.items():
                atol = furthest if part == "model" and undetermined(name) else 5e-5
                torch.testing.assert_close(stack[part][name][r : r + 1], tensor, rtol=1e-4, atol=atol, msg=name)


def test_slots_with_the_same_seed_and_fold_differ_by_their_weights_only() -> None:
    state, inputs = start([7, 7]), batch(1)
    others = (torch.cat([t, t]) for t in (inputs.label, inputs.sample, inputs.noise_d, inputs.noise_g))
    twice = Batch(tuple(torch.cat([x, x]) for x in inputs.x), *others)
    step(state, twice, weights(["pairwise"] * 2), Rules())
    for name, tensor in state.model_tensors().items():
        torch.testing.assert_close(tensor[0], tensor[1], rtol=1e-11, atol=1e-11, msg=name)
    step(state, twice, weights(["pairwise"] * 2, penalty_weight=[1.0, 2.0]), Rules())
    changed = {name for name, tensor in state.model_tensors().items() if (tensor[0] - tensor[1]).abs().max() > 1e-6}
    assert any(name.startswith("discriminator") for name in changed)


@pytest.mark.parametrize("losses", [["pairwise"] * 3, ["class_conditional", "published", "cross_entropy"]])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nan_or_infinite_row_affects_its_own_slot_only(losses: list[str], poison: float) -> None:
    clean, poisoned = start([1, 2, 3]), start([1, 2, 3])
    for number in range(2):
        inputs = batch(number, slots=3)
        step(clean, inputs, weights(losses), Rules())
        x = [part.clone() for part in inputs.x]
        x[1][1, 2, 3] = poison
        step(poisoned, replace(inputs, x=tuple(x)), weights(losses), Rules())
    ruined = poisoned.tensors()
    for part, tensors in clean.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor[[0, 2]], ruined[part][name][[0, 2]]), name
    assert poisoned.finite() == [True, False, True]
