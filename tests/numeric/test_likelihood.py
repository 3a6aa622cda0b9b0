"""Likelihoods against scipy, their limits, and parameters recovered from simulated data."""

from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from modis_dist.config.run import COUNTS
from modis_dist.config.run import Likelihood as Kind
from modis_dist.losses.vae import squared_error
from modis_dist.model.layers import initialise
from modis_dist.model.likelihood import Bernoulli, Gaussian, NegativeBinomial, Poisson, as_input, target
from modis_dist.model.networks import Vae
from tests.numeric.toy_system import normal

KINDS = get_args(Kind)
LIBRARY = torch.tensor([[40.0], [7.0], [300.0], [1.0]], dtype=torch.float64).expand(2, 4, 1)
LOG_THETA = normal(2, 1, 5, seed=4)
DECODED = normal(2, 4, 5, seed=1)
COUNT = torch.poisson(10 * normal(2, 4, 5, seed=2).exp(), generator=torch.Generator().manual_seed(0))


def expected_counts() -> Tensor:
    return LIBRARY * DECODED.softmax(-1)


def test_gaussian_equals_scipy_without_the_constant_and_is_bit_identical_to_the_squared_error() -> None:
    x, distribution = normal(2, 4, 5, seed=3), Gaussian(DECODED)
    log_prob = stats.norm.logpdf(x, DECODED) + np.log(2 * np.pi) / 2
    torch.testing.assert_close(distribution.log_prob(x), torch.as_tensor(log_prob), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.float64):
        rows, decoded = x.to(dtype), DECODED.to(dtype)
        assert torch.equal(-2 * Gaussian(decoded).log_prob(rows).mean(-1), squared_error(rows, decoded))


def test_bernoulli_equals_scipy_and_for_fractions_the_cross_entropy() -> None:
    x, distribution = (normal(2, 4, 5, seed=3) > 0).double(), Bernoulli(DECODED)
    log_prob = torch.as_tensor(stats.bernoulli.logpmf(x, distribution.mean))
    torch.testing.assert_close(distribution.log_prob(x), log_prob, rtol=1e-12, atol=1e-12)
    share = normal(2, 4, 5, seed=3).sigmoid()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(DECODED, share, reduction="none")
    torch.testing.assert_close(distribution.log_prob(share), -entropy, rtol=1e-12, atol=1e-12)


def test_poisson_equals_scipy_and_its_means_sum_to_the_library_size() -> None:
    distribution = Poisson(DECODED, LIBRARY)
    torch.testing.assert_close(distribution.mean, expected_counts())
    torch.testing.assert_close(distribution.mean.sum(-1, keepdim=True), LIBRARY)
    log_prob = torch.as_tensor(stats.poisson.logpmf(COUNT, expected_counts()))
    torch.testing.assert_close(distribution.log_prob(COUNT), log_prob, rtol=1e-11, atol=1e-11)


def test_negative_binomial_equals_scipy_and_approaches_the_poisson_without_dispersion() -> None:
    distribution, theta, mean = NegativeBinomial(DECODED, LIBRARY, LOG_THETA), LOG_THETA.exp(), expected_counts()
    log_prob = torch.as_tensor(stats.nbinom.logpmf(COUNT, theta.expand_as(mean), theta / (theta + mean)))
    torch.testing.assert_close(distribution.mean, mean)
    torch.testing.assert_close(distribution.log_prob(COUNT), log_prob, rtol=1e-10, atol=1e-10)
    limit = NegativeBinomial(DECODED, LIBRARY, torch.full_like(LOG_THETA, 16.0))
    torch.testing.assert_close(limit.log_prob(COUNT), Poisson(DECODED, LIBRARY).log_prob(COUNT), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "distribution", [Poisson(DECODED, 0 * LIBRARY), NegativeBinomial(DECODED, 0 * LIBRARY, LOG_THETA)]
)
def test_a_row_without_counts_has_a_finite_log_probability(distribution: Poisson | NegativeBinomial) -> None:
    assert distribution.log_prob(torch.zeros_like(DECODED)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_input_and_score_transforms_are_inverses(kind: str) -> None:
    values = torch.arange(0, 500_000, 7.0).view(1, 1, -1)  # of float32
    seen = as_input(kind, values)
    assert torch.equal(target(kind, seen), values)
    assert torch.equal(seen, values.log1p() if kind in COUNTS else values)
    large = torch.tensor([[[2e6, 1e7, 5e8]]])
    torch.testing.assert_close(target(kind, as_input(kind, large)), large, rtol=2e-6, atol=0.0)


# --- recovery -----------------------------------------------------------------------------------------------

ROWS, FEATURES = 3000, 6
PROPORTIONS = np.array([[0.4, 0.2, 0.2, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.2, 0.2, 0.4]])
THETA = np.array([1.0, 1.0, 2.0, 4.0, 8.0, 16.0])
LIBRARY_SIZES = np.random.default_rng(1).integers(100, 1000, (ROWS, 1))
CLASS = np.arange(ROWS) % 2


def simulated(kind: str) -> np.ndarray:
    """Rows of two classes with known parameters."""
    rng, library = np.random.default_rng(0), LIBRARY_SIZES
    match kind:
        case "gaussian":
            return 3 * PROPORTIONS[CLASS] + rng.standard_normal((ROWS, FEATURES))
        case "bernoulli":
            return (rng.random((ROWS, FEATURES)) < PROPORTIONS[CLASS]).astype(float)
        case "poisson":
            return rng.poisson(library * PROPORTIONS[CLASS]).astype(float)
        case _:
            mean = library * PROPORTIONS[CLASS]
            return rng.poisson(mean * rng.gamma(THETA, 1 / THETA, mean.shape)).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_recovers_the_parameters_of_simulated_data(kind: str) -> None:
    """Train the decoder with the objective's loss, with the class as latent."""
    vae = Vae(1, FEATURES, (16,), 2, eps=0.8, slope=0.2, kind=kind)
    initialise(vae, [3])
    observed = torch.as_tensor(simulated(kind), dtype=torch.float32).unsqueeze(0)
    z = torch.nn.functional.one_hot(torch.as_tensor(CLASS), 2).float().unsqueeze(0)
    library = torch.as_tensor(LIBRARY_SIZES, dtype=torch.float32).unsqueeze(0) if kind in COUNTS else None
    optimiser = torch.optim.Adam(vae.parameters(), lr=0.02)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        loss = -2 * vae.decode(z, library).log_prob(observed).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    vae.eval()
    recovered = vae.decode(z[:, :2], torch.ones(1, 2, 1) if kind in COUNTS else None).mean[0].detach().numpy()
    expected = 3 * PROPORTIONS if kind == "gaussian" else PROPORTIONS
    np.testing.assert_allclose(recovered, expected, rtol=0.12, atol=0.05)
    if kind == "negative_binomial":
        assert vae.log_theta is not None
        np.testing.assert_allclose(vae.log_theta.exp()[0].detach().numpy(), THETA, rtol=0.25)


def test_a_vae_for_counts_passes_the_library_size_to_its_likelihood() -> None:
    vae = Vae(2, 5, (6,), 3, eps=0.8, slope=0.2, kind="negative_binomial").double()
    initialise(vae, [1, 2])
    x = COUNT.log1p()
    output = vae(x, normal(2, 4, 3))
    torch.testing.assert_close(output.target, COUNT)
    torch.testing.assert_close(output.likelihood.mean.sum(-1), COUNT.sum(-1))
    vae.library.copy_(torch.tensor([[50.0], [7.0]]))
    torch.testing.assert_close(vae.decode(output.z).mean.sum(-1)[:, 0], torch.tensor([50.0, 7.0]).double())
    torch.testing.assert_close(vae.reconstruct(output.z), vae.decode(output.z).mean.log1p(), rtol=1e-9, atol=0)
