"""Row losses and label losses equal closed forms and explicit loops, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modis_dist.losses.labels import labelled_cross_entropy
from modis_dist.losses.vae import kl_divergence, squared_error
from tests.numeric import plain_reference as plain
from tests.numeric.toy_system import few, labels, normal

SEEDS = st.integers(0, 10_000)


def test_squared_error_is_the_mean_over_features_of_each_row() -> None:
    x, x_hat = normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2)
    expected = [[sum((x[r, b, p] - x_hat[r, b, p]) ** 2 for p in range(5)) / 5 for b in range(3)] for r in range(2)]
    torch.testing.assert_close(squared_error(x, x_hat), torch.tensor(expected, dtype=torch.float64))


def test_kl_divergence_equals_torch_distributions_summed_over_latent_dimensions() -> None:
    mu, logvar = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_divergence(mu, logvar), expected)


@few
@given(SEEDS, st.floats(0, 5))
def test_kl_divergence_is_not_negative_and_zero_only_at_the_standard_normal(seed: int, scale: float) -> None:
    mu, logvar = scale * normal(1, 2, 3, seed=seed), scale * normal(1, 2, 3, seed=seed + 1)
    assert (kl_divergence(mu, logvar) >= 0).all()
    assert (kl_divergence(mu.clamp_min(0) + 1, logvar) > 1).all()
    assert kl_divergence(0 * mu, 0 * logvar).eq(0).all()


@pytest.mark.parametrize("share_hidden", ["some", "none", "all"])
def test_labelled_cross_entropy_is_the_mean_over_labelled_rows(share_hidden: str) -> None:
    logits = normal(2, 3, 5, 4, seed=3).requires_grad_()
    label = labels(2, 3, 5, seed=4, classes=4)
    label = {"some": label, "none": label.abs(), "all": torch.full_like(label, -1)}[share_hidden]
    loss = labelled_cross_entropy(logits, label)
    expected = torch.stack(
        [torch.stack([plain.labelled_cross_entropy(logits[r, m], label[r, m]) for m in range(3)]) for r in range(2)]
    )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_a_modality_without_labels_adds_zero_loss_and_zero_gradient() -> None:
    logits = (1e4 * normal(1, 2, 4, 3)).requires_grad_()
    label = torch.tensor([[[0, 1, -1, 2], [-1, -1, -1, -1]]])
    loss = labelled_cross_entropy(logits, label)
    loss.sum().backward()
    assert loss[0, 1] == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1].eq(0).all()
    assert logits.grad[0, 0, 2].eq(0).all(), "unlabelled rows of a labelled modality have no gradient either"


@few
@given(SEEDS)
def test_the_gradient_of_labelled_cross_entropy_equals_finite_differences(seed: int) -> None:
    label = labels(1, 4, seed=seed)
    logits = normal(1, 4, 3, seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs: labelled_cross_entropy(inputs, label), logits)


def test_the_gradients_of_squared_error_and_kl_divergence_equal_finite_differences() -> None:
    first, second = normal(2, 3, 4, seed=1).requires_grad_(), normal(2, 3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(squared_error, (first, second))
    assert torch.autograd.gradcheck(kl_divergence, (first, second))
