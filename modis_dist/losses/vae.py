"""Losses of a single VAE, per row (paper, supplement A.2).

Legend: g any number of leading axes, the last of them rows; p features, l latent dimensions.
"""

from jaxtyping import Float
from torch import Tensor


def squared_error(x: Float[Tensor, "*g p"], x_hat: Float[Tensor, "*g p"]) -> Float[Tensor, "*g"]:
    """Squared error of each row, averaged over features (A.2, L_recon; averaged as in the published code)."""
    return (x - x_hat).square().mean(-1)


def kl_divergence(mu: Float[Tensor, "*g l"], logvar: Float[Tensor, "*g l"]) -> Float[Tensor, "*g"]:
    """KL(N(mu, sigma) || N(0, 1)) of each row in nats, summed over latent dimensions (A.2, D_KL)."""
    return 0.5 * (mu.square() + logvar.expm1() - logvar).sum(-1)
