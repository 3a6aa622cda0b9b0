"""The four adversarial losses equal explicit loops; their gradients and properties."""

from collections.abc import Callable
from math import log
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modis_dist.config.run import Objective
from modis_dist.losses.latents import Latents
from modis_dist.losses.table import ADVERSARIAL
from tests.numeric import plain_reference as plain
from tests.numeric.toy_system import KINDS, few, labels, normal

SIDES = ("discriminator", "encoder")
SEEDS = st.integers(0, 10_000)
every_loss = pytest.mark.parametrize(("kind", "side"), [(kind, side) for kind in KINDS for side in SIDES])
every_number_of_modalities = pytest.mark.parametrize("modalities", [2, 3, 4])


def loss_of(kind: str, side: str, label: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a loss of the package as a function of the logits, for rows without a predicted class."""
    z, certain = label.new_zeros(*label.shape, 1, dtype=torch.float64), torch.ones(len(label), dtype=torch.float64)
    undecided = torch.cat([z, z], -1)
    return lambda logits: getattr(ADVERSARIAL[kind], side)(
        Latents(z, z, logits, undecided, label, torch.zeros_like(label), certain)
    )


def published(side: str, logits: Tensor) -> Tensor:
    return loss_of("published", side, labels(*logits.shape[:3]))(logits)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logits)[0]


def test_the_configuration_accepts_exactly_the_implemented_losses() -> None:
    assert get_args(Objective.model_fields["adversarial_loss"].annotation) == tuple(ADVERSARIAL)


@every_number_of_modalities
@every_loss
def test_value_and_gradient_equal_explicit_loops(kind: str, side: str, modalities: int) -> None:
    label = labels(2, modalities, 4, seed=7)
    logits = normal(2, modalities, 4, modalities, seed=modalities).requires_grad_()
    losses = loss_of(kind, side, label)(logits)
    expected = torch.stack([plain.adversarial(kind, side, logits[r], label[r]) for r in range(2)])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(losses, logits), gradient(expected, logits), rtol=1e-12, atol=1e-12)


@every_number_of_modalities
@every_loss
def test_the_gradient_equals_finite_differences(kind: str, side: str, modalities: int) -> None:
    logits = normal(1, modalities, 3, modalities, seed=modalities).requires_grad_()
    assert torch.autograd.gradcheck(loss_of(kind, side, labels(1, modalities, 3, seed=5)), logits)


@few
@given(SEEDS, st.integers(2, 5))
def test_published_encoder_loss_is_ln_2_with_zero_gradient(seed: int, modalities: int) -> None:
    logits = normal(2, modalities, 3, modalities, seed=seed).requires_grad_()
    loss = published("encoder", logits)
    torch.testing.assert_close(loss, torch.full_like(loss, log(2)), rtol=1e-14, atol=0)
    assert gradient(loss, logits).abs().max() < 1e-15


@few
@given(SEEDS)
def test_published_discriminator_loss_is_constant_for_two_modalities(seed: int) -> None:
    logits = normal(2, 2, 3, 2, seed=seed).requires_grad_()
    loss = published("discriminator", logits)
    torch.testing.assert_close(loss, torch.full_like(loss, log(2)), rtol=1e-14, atol=0)
    assert gradient(loss, logits).abs().max() < 1e-15


@few
@given(SEEDS, st.integers(2, 4))
def test_published_discriminator_loss_is_invariant_to_exchanging_modalities(seed: int, modalities: int) -> None:
    logits = normal(1, modalities, 3, modalities, seed=seed)
    exchanged = logits[:, torch.randperm(modalities, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(published("discriminator", exchanged), published("discriminator", logits))


@every_loss
@few
@given(SEEDS)
def test_row_order_does_not_matter_if_all_modalities_are_permuted_alike(kind: str, side: str, seed: int) -> None:
    logits, label = normal(1, 3, 5, 3, seed=seed), labels(1, 3, 5, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    before = loss_of(kind, side, label)(logits)
    torch.testing.assert_close(loss_of(kind, side, label[:, :, order])(logits[:, :, order]), before)


@pytest.mark.parametrize("kind", ["cross_entropy", "class_conditional"])
@pytest.mark.parametrize("side", SIDES)
@few
@given(SEEDS)
def test_losses_that_do_not_pair_rows_are_invariant_to_row_order(kind: str, side: str, seed: int) -> None:
    logits, label = normal(1, 3, 5, 3, seed=seed), labels(1, 3, 5, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved, moved_label = logits.clone(), label.clone()
    moved[:, 1], moved_label[:, 1] = logits[:, 1, order], label[:, 1, order]
    torch.testing.assert_close(loss_of(kind, side, moved_label)(moved), loss_of(kind, side, label)(logits))


@pytest.mark.parametrize("kind", ["pairwise", "class_conditional"])
@pytest.mark.parametrize("side", SIDES)
@few
@given(SEEDS, st.floats(-50, 50))
def test_a_constant_added_to_one_critic_changes_nothing(kind: str, side: str, seed: int, shift: float) -> None:
    logits, label = normal(1, 3, 4, 3, seed=seed), labels(1, 3, 4, seed=seed)
    shifted = logits + shift * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(loss_of(kind, side, label)(shifted), loss_of(kind, side, label)(logits))


@pytest.mark.parametrize("kind", ["pairwise", "cross_entropy", "class_conditional"])
def test_a_confident_critic_has_a_lower_discriminator_loss_and_a_higher_encoder_loss(kind: str) -> None:
    sure = 3 * torch.eye(3, dtype=torch.float64)[None, :, None, :].expand(1, 3, 4, 3)
    label = torch.zeros(1, 3, 4, dtype=torch.long)
    unsure = torch.zeros_like(sure)
    assert loss_of(kind, "discriminator", label)(sure) < loss_of(kind, "discriminator", label)(unsure)
    assert loss_of(kind, "encoder", label)(sure) > loss_of(kind, "encoder", label)(unsure)


@pytest.mark.parametrize("side", SIDES)
def test_class_conditional_has_no_gradient_between_classes_or_from_unlabelled_rows(side: str) -> None:
    label = torch.tensor([[[0, 0, 1], [0, 2, -1], [2, -1, -1]]])
    logits = normal(1, 3, 3, 3).requires_grad_()
    actual = gradient(loss_of("class_conditional", side, label)(logits), logits)[0]
    has_partner = torch.tensor([[True, True, False], [True, True, False], [True, False, False]])
    assert torch.equal(actual.abs().sum(-1) > 0, has_partner)
    assert actual[0, :2, 2].eq(0).all(), (
        "class 0 is not in modality 2: its critic does not compare class 0 of modality 0"
    )
    assert actual[2, 0, 0].eq(0), "class 2 is not in modality 0"


@pytest.mark.parametrize("side", SIDES)
def test_class_conditional_with_one_class_is_pairwise_over_all_pairs_of_rows(side: str) -> None:
    logits, one_class = normal(1, 3, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)
    # Rolling modalities 1 and 2 by all (s, t) gives every pair of rows of two modalities equally often.
    rolls = [(0, s, t) for s in range(3) for t in range(3)]
    shifted = [torch.stack([logits[:, m].roll(by, 1) for m, by in enumerate(roll)], 1) for roll in rolls]
    paired = torch.stack([loss_of("pairwise", side, one_class)(inputs) for inputs in shifted]).mean(0)
    torch.testing.assert_close(loss_of("class_conditional", side, one_class)(logits), paired)


@pytest.mark.parametrize("side", SIDES)
def test_class_conditional_without_a_pair_is_zero_with_zero_gradient(side: str) -> None:
    logits = normal(1, 2, 3, 2).requires_grad_()
    loss = loss_of("class_conditional", side, torch.tensor([[[0, 0, -1], [1, 2, -1]]]))(logits)
    assert loss == 0
    assert gradient(loss, logits).eq(0).all()


@every_loss
def test_slots_do_not_mix(kind: str, side: str) -> None:
    logits, label = normal(3, 3, 4, 3), labels(3, 3, 4)
    whole = loss_of(kind, side, label)(logits)
    separate = torch.cat([loss_of(kind, side, label[r : r + 1])(logits[r : r + 1]) for r in range(3)])
    torch.testing.assert_close(whole, separate, rtol=1e-14, atol=0)


@every_loss
def test_confident_critics_give_finite_losses_and_gradients_in_float32(kind: str, side: str) -> None:
    logits = (1e4 * normal(1, 3, 4, 3)).float().requires_grad_()
    loss = loss_of(kind, side, labels(1, 3, 4))(logits)
    assert loss.isfinite().all()
    assert gradient(loss, logits).isfinite().all()
