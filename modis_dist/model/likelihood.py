"""Likelihoods p(x|z), the output of a decoder.

A likelihood has ``log_prob`` of each feature, which the objective maximises, and ``mean``, which prediction and
evaluation report. To add one, add a class, its case in ``likelihood`` and its name to
``Likelihood`` (and ``COUNTS``) in ``config/run.py``.

Encoders take log(1 + count), computed in preprocessing; likelihoods score the counts. ``target`` and ``as_input``
convert between the two. A count likelihood models the proportions of the features in a row: its mean is the softmax of
the decoder output times the library size, the total count of the row (the default of scvi-tools, Lopez et al. 2018).

Legend: r slots, b rows, p features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from modis_dist.config.run import COUNTS

Rows = Float[Tensor, "r b p"]


@dataclass(frozen=True)
class Gaussian:
    """Normal with unit variance; the decoder outputs the mean.

    ``log_prob`` omits the constant -log(2 pi) / 2, so that -2 ``log_prob`` is the squared error.
    """

    decoded: Rows

    @property
    def mean(self) -> Rows:
        """Expected value."""
        return self.decoded

    def log_prob(self, x: Rows) -> Rows:
        """Log density of each value, without the constant."""
        return -0.5 * (x - self.decoded).square()


@dataclass(frozen=True)
class Bernoulli:
    """Values from 0 to 1; the decoder outputs logits."""

    decoded: Rows

    @property
    def mean(self) -> Rows:
        """Probability of a 1."""
        return self.decoded.sigmoid()

    def log_prob(self, x: Rows) -> Rows:
        """Log probability of each value; for values between 0 and 1 the negative cross-entropy."""
        return x * self.decoded - F.softplus(self.decoded)


@dataclass(frozen=True)
class Poisson:
    """Counts with variance equal to their mean; the decoder outputs logits of the proportions."""

    decoded: Rows
    library: Float[Tensor, "r _ 1"]  # total count of each row

    @property
    def log_mean(self) -> Rows:
        """Logarithm of the expected counts."""
        return self.decoded.log_softmax(-1) + self.library.clamp_min(1).log()

    @property
    def mean(self) -> Rows:
        """Expected counts."""
        return self.log_mean.exp()

    def log_prob(self, x: Rows) -> Rows:
        """Log probability of each count."""
        log_mean = self.log_mean
        return x * log_mean - log_mean.exp() - torch.lgamma(x + 1)


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts with variance mean + mean^2 / theta; the decoder outputs logits of the proportions."""

    decoded: Rows
    library: Float[Tensor, "r _ 1"]  # total count of each row
    log_theta: Float[Tensor, "r 1 p"]  # per feature, a learned parameter

    @property
    def mean(self) -> Rows:
        """Expected counts."""
        return Poisson(self.decoded, self.library).mean

    def log_prob(self, x: Rows) -> Rows:
        """Log probability of each count."""
        log_mean, theta = Poisson(self.decoded, self.library).log_mean, self.log_theta.exp()
        log_sum = torch.logaddexp(log_mean, self.log_theta)  # log(mean + theta)
        choose = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return choose + theta * (self.log_theta - log_sum) + x * (log_mean - log_sum)


Likelihood = Gaussian | Bernoulli | Poisson | NegativeBinomial


def likelihood(kind: str, decoded: Tensor, library: Tensor | None, log_theta: Tensor | None) -> Likelihood:
    """Return the likelihood of a kind, given the decoder's output and the parameters that the kind needs."""
    match kind, library, log_theta:
        case "gaussian", _, _:
            return Gaussian(decoded)
        case "bernoulli", _, _:
            return Bernoulli(decoded)
        case "poisson", Tensor(), _:
            return Poisson(decoded, library)
        case "negative_binomial", Tensor(), Tensor():
            return NegativeBinomial(decoded, library, log_theta)
    raise AssertionError(kind)


def target(kind: str, x: Tensor) -> Tensor:
    """Convert encoder input to the values that a likelihood scores.

    Counts below 500,000 are exact in float32, larger ones are within two millionths.
    """
    return x.expm1().round() if kind in COUNTS else x


def as_input(kind: str, values: Tensor) -> Tensor:
    """Convert values on the scale of the likelihood to encoder input; the inverse of ``target``, without rounding."""
    return values.log1p() if kind in COUNTS else values
