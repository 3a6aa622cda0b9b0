"""The clustering loss equals explicit sums, its bandwidth is detached, and separated clusters minimise it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modis_dist.losses.clustering import clustering, kernel, negative_entropy, overlaps
from tests.numeric import plain_reference as plain
from tests.numeric.toy_system import few, normal

SEEDS = st.integers(0, 10_000)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
EMPIRICAL = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def to_corners(probability: Tensor) -> Tensor:
    """exp(-|a - e_k|^2)."""
    return torch.exp(-(probability.unsqueeze(-2) - torch.eye(3, dtype=torch.float64)).square().sum(-1))


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("prior", [UNIFORM, EMPIRICAL], ids=["uniform", "empirical"])
def test_all_three_terms_and_their_gradients_equal_explicit_loops(prior: Tensor, rows: int) -> None:
    logits, h = normal(2, 2, rows, 3, seed=1).requires_grad_(), normal(2, 2, rows, 4, seed=2).requires_grad_()
    a = logits.softmax(-1)
    similarity = kernel(h)
    c1, c2 = overlaps([a], similarity), overlaps([to_corners(a)], similarity)
    c3 = negative_entropy(a, prior)
    whole = clustering(a, h, prior.expand(2, 1, 3))
    for r in range(2):
        for m in range(2):
            parts = plain.clustering_parts(a[r, m], h[r, m], prior, plain.bandwidth(h[r, m].detach()))
            torch.testing.assert_close(torch.stack([c1[r, m], c2[r, m], c3[r, m]]), torch.stack(parts))
            torch.testing.assert_close(whole[r, m], sum(parts))
            gradients = torch.autograd.grad(whole[r, m], (logits, h), retain_graph=True)
            expected = torch.autograd.grad(sum(parts), (logits, h), retain_graph=True)
            torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_the_entropy_term_with_a_uniform_prior_equals_the_published_one() -> None:
    a = normal(1, 1, 5, 3).softmax(-1)
    mean = a.mean(-2)
    torch.testing.assert_close(negative_entropy(a, UNIFORM), (mean * mean.log()).sum(-1))


def test_the_entropy_term_is_smallest_if_the_mean_equals_the_prior() -> None:
    at_prior = negative_entropy(EMPIRICAL.expand(4, 3), EMPIRICAL)
    torch.testing.assert_close(at_prior, -torch.log(torch.tensor(3.0, dtype=torch.float64)))
    for seed in range(20):
        assert negative_entropy(normal(4, 3, seed=seed).softmax(-1), EMPIRICAL) > at_prior


def test_the_prior_of_a_slot_applies_to_its_own_modalities() -> None:
    a, priors = normal(2, 3, 5, 3).softmax(-1), torch.stack([UNIFORM, EMPIRICAL])
    whole = negative_entropy(a, priors.unsqueeze(1))
    torch.testing.assert_close(whole, torch.stack([negative_entropy(a[r], priors[r]) for r in range(2)]))


def test_a_class_without_training_rows_leaves_the_entropy_finite() -> None:
    a = normal(1, 4, 3).requires_grad_()
    loss = negative_entropy(a.softmax(-1), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    loss.sum().backward()
    assert a.grad is not None
    assert loss.isfinite().all()
    assert a.grad.isfinite().all()


def test_bandwidth_is_not_differentiated() -> None:
    h = normal(5, 2, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(h)[0, 1], h)
    with torch.no_grad():
        bandwidth, eps = plain.bandwidth(h), 1e-6
        expected, with_bandwidth = torch.zeros_like(h), torch.zeros_like(h)
        for i in range(5):
            for d in range(2):
                values = []
                for sign in (1, -1):
                    moved = h.clone()
                    moved[i, d] += sign * eps
                    values.append(
                        (torch.exp(-(moved[0] - moved[1]).square().sum() / (2 * bandwidth)), kernel(moved)[0, 1])
                    )
                expected[i, d], with_bandwidth[i, d] = (
                    (up - down) / (2 * eps) for up, down in zip(*values, strict=True)
                )
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    assert (with_bandwidth - expected).abs().max() > 1e-3, "the bandwidth must depend on h"
    assert gradient[2:].eq(0).all()


def test_equal_rows_reach_the_minimum_bandwidth() -> None:
    h = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
    similarity = kernel(h)
    similarity.sum().backward()
    assert h.grad is not None
    assert similarity.eq(1).all()
    assert h.grad.isfinite().all()
    nearly = torch.cat([h.detach(), h.detach()[:1] + 1e-5])
    expected = torch.exp(torch.tensor(-3e-10 / 2e-9, dtype=torch.float64))
    torch.testing.assert_close(kernel(nearly)[0, 4], expected, rtol=1e-4, atol=0)


def test_similarities_of_close_rows_far_from_zero_equal_those_in_float64() -> None:
    h = (5 + 1e-3 * normal(1, 20, 64, seed=1)).float()
    torch.testing.assert_close(kernel(h).double(), kernel(h.double()), rtol=0, atol=1e-6)


@few
@given(SEEDS)
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    a, h = normal(1, 5, 3, seed=seed).softmax(-1), normal(1, 5, 4, seed=seed + 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(clustering(a[:, order], h[:, order], EMPIRICAL), clustering(a, h, EMPIRICAL))


@few
@given(SEEDS)
def test_similarities_are_invariant_to_rotation_shift_and_scale_of_h(seed: int) -> None:
    h = normal(6, 3, seed=seed)
    rotation, _ = torch.linalg.qr(normal(3, 3, seed=seed + 1))
    torch.testing.assert_close(kernel(7 * h @ rotation + 2), kernel(h), rtol=1e-7, atol=1e-9)


@few
@given(SEEDS)
def test_separated_clusters_have_a_lower_loss(seed: int) -> None:
    member = torch.arange(9) % 3
    sure = 6 * torch.nn.functional.one_hot(member, 3).double()
    separated = 5 * torch.eye(3, dtype=torch.float64)[member] + 0.1 * normal(9, 3, seed=seed)
    mixed = normal(9, 3, seed=seed)
    shuffled = sure[torch.randperm(9, generator=torch.Generator().manual_seed(seed))]
    best = clustering(sure.softmax(-1), separated, UNIFORM)
    assert best < clustering(sure.softmax(-1), mixed, UNIFORM), "equal predictions, overlapping clusters"
    assert best < clustering((0.1 * sure).softmax(-1), separated, UNIFORM), "equal clusters, unsure predictions"
    assert best <= clustering(shuffled.softmax(-1), separated, UNIFORM) + 1e-9, (
        "predictions independent of the clusters"
    )


def test_probabilities_that_underflow_in_float32_leave_value_and_gradient_finite() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]] * 4, requires_grad=True)
    h = normal(4, 3).float().requires_grad_()
    clustering(logits.softmax(-1), h, UNIFORM.float()).backward()
    for tensor in (logits, h):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_slots_and_modalities_do_not_mix() -> None:
    a, h = normal(2, 3, 5, 3).softmax(-1), normal(2, 3, 5, 4, seed=1)
    separate = torch.stack([torch.stack([clustering(a[r, m], h[r, m], UNIFORM) for m in range(3)]) for r in range(2)])
    torch.testing.assert_close(clustering(a, h, UNIFORM.expand(2, 1, 3)), separate, rtol=1e-13, atol=1e-15)
