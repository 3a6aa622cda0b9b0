"""A loss on paired rows, as a user would add one: critics and latents of the same sample in two modalities."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from modis_dist.losses.latents import Latents
from modis_dist.losses.table import ADVERSARIAL, LossPair


def paired(latents: Latents, sign: int) -> Float[Tensor, " r"]:
    """Mean of softplus(sign (d_i[i] - d_j[i])) + |z_i - z_j|^2 / l over rows of one sample in modalities i != j."""
    own = latents.logits.diagonal(dim1=1, dim2=3).mT[..., None, None]  # [r, i, b, 1, 1]
    lead = own - latents.logits.permute(0, 3, 1, 2).unsqueeze(2)  # [r, i, b, j, c]
    squares = (latents.z[:, :, :, None, None] - latents.z[:, None, None]).square().mean(-1)
    other = ~torch.eye(lead.shape[1], dtype=torch.bool, device=lead.device)[:, None, :, None]
    same = (latents.sample[..., None, None] == latents.sample[:, None, None]) & other
    values = torch.where(same, F.softplus(sign * lead) + squares, 0.0)
    return values.sum((1, 2, 3, 4)) / same.sum((1, 2, 3, 4)).clamp_min(1)


@contextmanager
def registered() -> Iterator[None]:
    """Add the loss to the table under the name ``paired``."""
    with patch.dict(ADVERSARIAL, paired=LossPair(partial(paired, sign=-1), partial(paired, sign=1))):
        yield
