"""A replicate's result does not depend on who it is stacked with."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from toy_system import CPU, KINDS, ROWS, SHAPE, batch, prepared, start, step, weights

from modis_dist.objective import Batch, Rules, Weights
from modis_dist.train.loader import Loader
from modis_dist.train.prepare import Prepared
from modis_dist.train.state import TrainState

SEEDS = [3, 1, 4, 1, 5, 9, 2, 6]
STEPS = 10


def folds() -> list[Prepared]:
    """Four sets of training rows of different lengths, two replicates each."""
    sets = [prepared({"a": 20 + n, "b": 19, "c": 23 - n}, seed=n) for n in range(4)]
    return [sets[r // 2] for r in range(8)]


def mixed(dtype: torch.dtype) -> Weights:
    """Everything that may differ between replicates does."""
    spread = torch.arange(1, 9, dtype=dtype)
    return Weights(
        beta=0.01 * spread,
        adversarial=spread / 4,
        lambda_r=torch.tensor([0.0, 1, 2, 3, 0, 5, 6, 7], dtype=dtype),
        label=spread.flip(0) / 4,
        clustering=spread.sqrt() / 2,
        confidence=0.3 + spread / 50,
        prior=(torch.eye(3, dtype=dtype).repeat(3, 1)[:8] + 0.5) / 2.5,
        losses=KINDS + KINDS[::-1],
    )


def only(how: Weights, r: int) -> Weights:
    """One replicate's weights."""
    parts: dict[str, Any] = {field.name: getattr(how, field.name)[r : r + 1] for field in fields(how)}
    return Weights(**parts)


def trained(members: list[int], rules: Rules, dtype: torch.dtype) -> TrainState:
    data, how = folds(), mixed(dtype)
    stack = Weights(
        *(
            tuple(how.losses[r] for r in members) if field.name == "losses" else getattr(how, field.name)[members]
            for field in fields(how)
        )
    )
    loader = Loader(
        [data[r] for r in members],
        [SEEDS[r] for r in members],
        batch_size=ROWS,
        epoch_ends="shortest",
        latent=SHAPE.latent,
        signs=rules.penalty == "each",
        device=CPU,
        dtype=dtype,
    )
    state = start([SEEDS[r] for r in members], dtype=dtype)
    for number in range(STEPS):
        epoch, at = divmod(number, loader.steps)
        step(state, loader.batch(epoch=epoch, step=at), stack, rules)
    return state


# In float32 a batch of products sums in another order than one product; ten Adam steps of 1e-3 move a weight by 1e-2,
# and where a gradient is near zero its rounding decides part of a step.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("rules", [Rules(), Rules(kl_reduction="mean", penalty="each", penalty_on="z")])
def test_a_replicate_alone_equals_its_slice_of_eight(rules: Rules, dtype: torch.dtype, tolerance: float) -> None:
    stack = trained(list(range(8)), rules, dtype).tensors()
    for r in range(8):
        alone = trained([r], rules, dtype).tensors()
        for part in ("model", "optim"):
            for name, tensor in alone[part].items():
                torch.testing.assert_close(stack[part][name][r : r + 1], tensor, rtol=0, atol=tolerance, msg=name)


def test_replicates_of_one_seed_and_one_fold_differ_by_their_weights_only() -> None:
    state, given = start([7, 7]), batch(1)
    twice = Batch(*(tuple(torch.cat([x, x]) for x in given.x), *(torch.cat([t, t]) for t in (given.label, given.noise_d, given.noise_g))))  # fmt: skip
    step(state, twice, weights(["pairwise"] * 2), Rules())
    assert all(torch.equal(tensor[0], tensor[1]) for tensor in state.model_tensors().values())
    step(state, twice, weights(["pairwise"] * 2, lambda_r=[1.0, 2.0]), Rules())
    assert not all(torch.equal(tensor[0], tensor[1]) for tensor in state.model_tensors().values())


@pytest.mark.parametrize("losses", [["pairwise"] * 3, ["class_conditional", "published", "cross_entropy"]])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_a_number_ruins_its_own_replicate_only(losses: list[str], poison: float) -> None:
    clean, poisoned = start([1, 2, 3]), start([1, 2, 3])
    for number in range(2):
        given = batch(number, replicates=3)
        step(clean, given, weights(losses), Rules())
        x = [part.clone() for part in given.x]
        x[1][1, 2, 3] = poison
        step(poisoned, replace(given, x=tuple(x)), weights(losses), Rules())
    ruined = poisoned.tensors()
    for part, tensors in clean.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor[[0, 2]], ruined[part][name][[0, 2]]), name
    assert poisoned.finite() == [True, False, True]


def test_only_takes_one_replicates_weights() -> None:
    assert only(mixed(torch.float64), 2).losses == ("class_conditional",)
