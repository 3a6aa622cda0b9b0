"""Clustering loss on class probabilities and hidden activations (paper, A.2: L_C1 + L_C2 + L_C3).

Legend: g any number of leading axes (slots, modalities), n rows, k classes, w hidden width. All three terms
couple the rows of the global batch. Source of the terms: Kampffmeyer et al. 2019; Tang et al. 2023.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

RELATIVE_BANDWIDTH = 0.15  # relative to the median squared distance, as published
SMALLEST = 1e-9


def clustering(
    probability: Float[Tensor, "*g n k"], h: Float[Tensor, "*g n w"], prior: Float[Tensor, "*#g k"]
) -> Float[Tensor, "*g"]:
    """L_C1 + L_C2 + L_C3; ``prior`` is the target class distribution of L_C3 (uniform in the paper)."""
    nearness = torch.exp(2 * probability - probability.square().sum(-1, keepdim=True) - 1)  # exp(-|a - e_k|^2)
    return overlaps([probability, nearness], kernel(h)) + negative_entropy(probability, prior)


def kernel(h: Float[Tensor, "*g n w"]) -> Float[Tensor, "*g n n"]:
    """exp(-|h_i - h_j|^2 / (2 s2)), s2 = 0.15 of the median of all squared distances, not differentiated.

    Rows are centred first: for close rows far from zero, the difference of products would be mostly rounding error.
    """
    h = h - h.detach().mean(-2, keepdim=True)
    inner = h @ h.transpose(-1, -2)
    norm = inner.diagonal(dim1=-2, dim2=-1)
    squared = (norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * inner).clamp_min(0)
    median = squared.detach().flatten(-2).median(-1).values
    bandwidth = (RELATIVE_BANDWIDTH * median).clamp_min(SMALLEST)
    return torch.exp(-squared / (2 * bandwidth[..., None, None]))


def overlaps(
    assignments: Sequence[Float[Tensor, "*g n k"]], similarity: Float[Tensor, "*g n n"]
) -> Float[Tensor, "*g"]:
    """Sum over assignments a of the mean over class pairs i < j of a_i' S a_j / sqrt(a_i' S a_i * a_j' S a_j).

    This is the Cauchy-Schwarz overlap of classes. One matrix product with S serves all assignments.
    """
    classes = assignments[0].shape[-1]
    smoothed = torch.split(similarity @ torch.cat(list(assignments), -1), classes, -1)
    gram = torch.stack([a.mT @ s for a, s in zip(assignments, smoothed, strict=True)])
    size = gram.diagonal(dim1=-2, dim2=-1)
    ratio = gram * torch.rsqrt((size.unsqueeze(-1) * size.unsqueeze(-2)).clamp_min(SMALLEST**2))
    return ratio.triu(1).sum((0, -2, -1)) / (classes * (classes - 1) / 2)


def negative_entropy(probability: Float[Tensor, "*g n k"], prior: Float[Tensor, "*#g k"]) -> Float[Tensor, "*g"]:
    """sum_k abar_k log(abar_k / (K prior_k)), abar the mean over rows; with a uniform prior, L_C3 as published."""
    mean = probability.mean(-2)
    classes = probability.shape[-1]
    return (mean * (mean.clamp_min(SMALLEST).log() - (classes * prior).clamp_min(SMALLEST).log())).sum(-1)
