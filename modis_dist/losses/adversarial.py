"""Adversarial losses on the modality logits.

Every loss takes the ``Latents`` of a global batch and returns one value per slot. Entry [r, m, b, c] of the logits is
the output of critic c (one per modality) for row b of modality m in slot r. Rows of two modalities are paired by their
position in the batch unless stated otherwise.
Sources: paper, supplement A.2; Huang et al. 2024 (R3GAN, arXiv:2501.05441) for the pairing loss.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from modis_dist.losses.latents import Latents


def published_discriminator(latents: Latents) -> Float[Tensor, " r"]:
    """A.2 as published: softplus(-sum_i (d_i - sum_{j != i} d_j)) over rows and logits.

    The sums collapse to (2 - M) sum_i d_i, which does not distinguish modalities. Kept to reproduce the paper.
    """
    logits = latents.logits
    total = logits.sum(1, keepdim=True)
    inner = (logits - (total - logits)).sum(1)
    return F.softplus(-inner).mean((1, 2))


def published_encoder(latents: Latents) -> Float[Tensor, " r"]:
    """A.2 as published: softplus(-sum_i sum_{j != i} (d_j - d_i)).

    The double sum cancels: the value is always ln 2 and the gradient zero, so the encoders are not aligned.
    """
    logits, modalities = latents.logits, latents.logits.shape[1]
    total = logits.sum(1, keepdim=True)
    inner = ((total - logits) - (modalities - 1) * logits).sum(1)
    return F.softplus(-inner).mean((1, 2))


def pairwise_discriminator(latents: Latents) -> Float[Tensor, " r"]:
    """R3GAN's pairing loss for M critics: mean over i != j of softplus(-(d_i[i] - d_j[i]))."""
    return mean_over_others(F.softplus(-margins(latents.logits)))


def pairwise_encoder(latents: Latents) -> Float[Tensor, " r"]:
    """Encoder side of the pairing loss: mean over i != j of softplus(-(d_j[i] - d_i[i]))."""
    return mean_over_others(F.softplus(margins(latents.logits)))


def cross_entropy_discriminator(latents: Latents) -> Float[Tensor, " r"]:
    """The classical adversarial loss: cross-entropy of modality classification."""
    return -latents.logits.log_softmax(-1).diagonal(dim1=1, dim2=3).mean((1, 2))


def cross_entropy_encoder(latents: Latents) -> Float[Tensor, " r"]:
    """Encoder side: cross-entropy against a uniform target over the other modalities."""
    return mean_over_others(-latents.logits.log_softmax(-1))


def class_conditional_discriminator(latents: Latents) -> Float[Tensor, " r"]:
    """Pairing loss over all pairs of rows of the same class, given or predicted; other rows are left out."""
    return _mean_of_same_class(latents.logits, latents.predicted_labels(), sign=-1)


def class_conditional_encoder(latents: Latents) -> Float[Tensor, " r"]:
    """Encoder side of the class-conditional pairing loss."""
    return _mean_of_same_class(latents.logits, latents.predicted_labels(), sign=1)


def margins(logits: Float[Tensor, "r m b m"]) -> Float[Tensor, "r m b m"]:
    """margin[r, j, b, i] = d_i[b, i] - d_j[b, i]: of critic i, for a row of its own modality over one of modality j."""
    return logits.diagonal(dim1=1, dim2=3).unsqueeze(1) - logits


def mean_over_others(values: Float[Tensor, "r m b m"]) -> Float[Tensor, " r"]:
    """Mean of values[r, j, b, i] over rows and the pairs i != j."""
    modalities, rows = values.shape[1], values.shape[2]
    others = ~torch.eye(modalities, dtype=torch.bool, device=values.device).unsqueeze(1)
    return (values * others).sum((1, 2, 3)) / (modalities * (modalities - 1) * rows)


def _mean_of_same_class(logits: Tensor, label: Tensor, *, sign: int) -> Tensor:
    """Mean over i != j and all pairs of rows (b of i, c of j) of one class; 0 where there is no such pair."""
    modalities = logits.shape[1]
    matching = logits.diagonal(dim1=1, dim2=3)  # [r, b, i]
    lead = matching[:, None, :, None, :] - logits[:, :, None, :, :]  # [r, j, b, c, i]
    label_c = label[:, :, None, :, None]  # of row c of modality j
    label_b = label.transpose(1, 2)[:, None, :, None, :]  # of row b of modality i
    other_modality = ~torch.eye(modalities, dtype=torch.bool, device=logits.device)[:, None, None, :]
    same_class = (label_c == label_b) & (label_b >= 0) & other_modality
    values = torch.where(same_class, F.softplus(sign * lead), 0.0)
    return values.sum((1, 2, 3, 4)) / same_class.sum((1, 2, 3, 4)).clamp_min(1)
