"""Slow reference implementation: loops over rows and classes, plain layers, one row's gradient at a time.

Independent of the package's losses and layers. Tensors have no slot axis: ``d[i][b][c]`` is the logit c of row b of
modality i.
"""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modis_dist.model.layers import StackedBatchNorm, StackedLinear
from modis_dist.model.networks import Modis, Shape

# --- losses -------------------------------------------------------------------------------------------------


def softplus(value: Tensor) -> Tensor:
    """ln(1 + exp(value))."""
    return torch.log(1 + torch.exp(value))


def mean(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of scalars."""
    return sum(values[1:], values[0]) / len(values)


def cross_entropy(logits: Tensor, name: int) -> Tensor:
    """-ln softmax(logits)[name]."""
    return -torch.log(torch.exp(logits[name]) / sum(torch.exp(logit) for logit in logits))


def adversarial(kind: str, side: str, d: Tensor, label: Tensor) -> Tensor:
    """Return one of the four adversarial losses; ``label`` [m, b] is used by class_conditional only."""
    modalities, rows = d.shape[:2]
    pairs = [(i, j) for i, j in product(range(modalities), repeat=2) if i != j]
    sign = -1 if side == "discriminator" else 1
    if kind == "published":
        values = []
        for b, c in product(range(rows), range(modalities)):
            if side == "discriminator":
                inner = sum(
                    d[i, b, c] - sum(d[j, b, c] for j in range(modalities) if j != i) for i in range(modalities)
                )
            else:
                inner = sum(d[j, b, c] - d[i, b, c] for i, j in pairs)
            values.append(softplus(-inner))
        return mean(values)
    if kind == "pairwise":
        return mean([softplus(sign * (d[i, b, i] - d[j, b, i])) for i, j in pairs for b in range(rows)])
    if kind == "cross_entropy" and side == "discriminator":
        return mean([cross_entropy(d[i, b], i) for i in range(modalities) for b in range(rows)])
    if kind == "cross_entropy":
        return mean([cross_entropy(d[j, b], i) for i, j in pairs for b in range(rows)])
    values = [
        softplus(sign * (d[i, b, i] - d[j, c, i]))
        for i, j in pairs
        for b, c in product(range(rows), repeat=2)
        if label[i, b] == label[j, c] and label[i, b] >= 0
    ]
    return mean(values) if values else 0 * d.sum()


def paired(side: str, z: Tensor, d: Tensor, sample: Tensor) -> Tensor:
    """Return the loss of ``paired_loss``: critics and latents of rows of one sample in two modalities."""
    modalities, rows = d.shape[:2]
    sign = -1 if side == "discriminator" else 1
    values = [
        softplus(sign * (d[i, b, i] - d[j, c, i])) + ((z[i, b] - z[j, c]) ** 2).mean()
        for i, j in product(range(modalities), repeat=2)
        for b, c in product(range(rows), repeat=2)
        if i != j and sample[i, b] == sample[j, c]
    ]
    return mean(values)


def bandwidth(h: Tensor) -> float:
    """Return 0.15 times the (lower) median of all n^2 squared distances, at least 1e-9."""
    squares = sorted(float(((a - b) ** 2).sum()) for a in h.detach() for b in h.detach())
    return max(0.15 * squares[(len(squares) - 1) // 2], 1e-9)


def clustering_parts(a: Tensor, h: Tensor, prior: Tensor, s2: float) -> tuple[Tensor, Tensor, Tensor]:
    """C1, C2, C3 of one modality; a [n, K], h [n, w]."""
    rows, classes = a.shape
    similar = torch.stack([torch.exp(-((h - h[i]) ** 2).sum(1) / (2 * s2)) for i in range(rows)])

    def form(u: Tensor, v: Tensor) -> Tensor:
        return u @ similar @ v

    def overlap(columns: list[Tensor]) -> Tensor:
        return mean([form(u, v) / torch.sqrt(form(u, u) * form(v, v)) for u, v in combinations(columns, 2)])

    corner = torch.eye(classes, dtype=a.dtype)
    c1 = overlap([a[:, k] for k in range(classes)])
    c2 = overlap(
        [torch.stack([torch.exp(-((a[i] - corner[k]) ** 2).sum()) for i in range(rows)]) for k in range(classes)]
    )
    share = [mean([a[i, k] for i in range(rows)]) for k in range(classes)]
    c3 = sum(share[k] * torch.log(share[k] / (classes * prior[k])) for k in range(classes))
    return c1, c2, c3


def labelled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the mean over the labelled rows of one modality, 0 if there are none."""
    values = [cross_entropy(row, int(k)) for row, k in zip(logits, label, strict=True) if k >= 0]
    return mean(values) if values else 0 * logits.sum()


def known_labels(logits: Tensor, label: Tensor, confidence: float) -> Tensor:
    """Return each class, else the predicted one if its probability reaches the confidence, else -1; [m, b]."""
    known = label.clone()
    for m, b in product(*map(range, label.shape)):
        probability = logits[m, b].detach().softmax(0)
        if label[m, b] < 0 and probability.max() >= confidence:
            known[m, b] = int(probability.argmax())
    return known


# --- networks -----------------------------------------------------------------------------------------------


def hidden(batch: int, outputs: int, shape: Shape) -> list[nn.Module]:
    """Linear -> BatchNorm1d -> LeakyReLU."""
    return [
        nn.Linear(batch, outputs, dtype=torch.float64),
        nn.BatchNorm1d(outputs, eps=shape.eps, dtype=torch.float64),
        nn.LeakyReLU(shape.slope),
    ]


class PlainVae(nn.Module):
    """The VAE of one slot, of plain layers."""

    def __init__(self, shape: Shape, modality: str) -> None:
        super().__init__()
        p, widths = shape.features[modality], shape.hidden[modality]
        layers: list[nn.Module] = []
        before = p
        for width in widths[:-1]:
            layers += hidden(before, width, shape)
            before = width
        self.encoder = nn.Sequential(*layers, nn.Linear(before, widths[-1], dtype=torch.float64))
        self.mu = nn.Linear(widths[-1], shape.latent, dtype=torch.float64)
        self.logvar = nn.Linear(widths[-1], shape.latent, dtype=torch.float64)
        layers, before = [], shape.latent
        for width in reversed(widths):
            layers += hidden(before, width, shape)
            before = width
        self.decoder = nn.Sequential(*layers, nn.Linear(before, p, dtype=torch.float64))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu, sigma and z."""
        h = self.encoder(x)
        mu, sigma = self.mu(h), torch.sqrt(torch.exp(self.logvar(h)))
        return mu, sigma, mu + sigma * noise


class PlainDiscriminator(nn.Module):
    """The discriminator of one slot, of plain layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = shape.latent
        for width in shape.discriminator:
            layers += [nn.Linear(before, width, dtype=torch.float64), nn.LeakyReLU(shape.slope)]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.modality = nn.Linear(before, len(shape.features), dtype=torch.float64)
        self.label = nn.Linear(before, shape.classes, dtype=torch.float64)


class PlainSystem:
    """One slot of a stacked model, with its weights copied to plain layers."""

    def __init__(self, model: Modis, slot: int = 0) -> None:
        self.vaes = nn.ModuleList(PlainVae(model.shape, m) for m in model.shape.features)
        self.discriminator = PlainDiscriminator(model.shape)
        for plain, stacked in self._pairs(model):
            for name, tensor in stacked.state_dict().items():
                plain.state_dict()[name].copy_(tensor[slot])

    def _pairs(self, model: Modis) -> list[tuple[nn.Module, nn.Module]]:
        plain = [
            layer
            for part in (self.vaes, self.discriminator)
            for layer in part.modules()
            if isinstance(layer, nn.Linear | nn.BatchNorm1d)
        ]
        stacked = [layer for layer in model.modules() if isinstance(layer, StackedLinear | StackedBatchNorm)]
        return list(zip(plain, stacked, strict=True))

    def largest_difference(self, model: Modis, slot: int = 0) -> float:
        """Return the largest absolute difference over all parameters and running statistics."""
        return max(
            float((plain.state_dict()[name] - tensor[slot]).abs().max())
            for plain, stacked in self._pairs(model)
            for name, tensor in stacked.state_dict().items()
        )


# --- the two phases -----------------------------------------------------------------------------------------


def squared_gradients(plain: PlainSystem, m: int, x: Tensor, noise: Tensor, signs: Tensor, on: str) -> list[Tensor]:
    """Return |gradient of the signed sum of logits|^2 per row, with respect to x or z, with encoders in eval mode."""
    squares = []
    for b in range(len(x)):
        row = x[b : b + 1].clone().requires_grad_()
        _, _, z = plain.vaes[m](row, noise[b : b + 1])
        if on == "z":
            row = z = z.detach().requires_grad_()
        logits = plain.discriminator.modality(plain.discriminator.trunk(z))
        (gradient,) = torch.autograd.grad((logits[0] * signs[b]).sum(), row, create_graph=True)
        squares.append((gradient**2).sum())
    return squares


def class_terms(logits: Tensor, h: Tensor, label: Tensor, weights: Any) -> Tensor:
    """Return the weighted L_C + L_clustering of one modality."""
    clustering = sum(clustering_parts(logits.softmax(-1), h, weights.prior[0], bandwidth(h)))
    return weights.classification[0] * labelled_cross_entropy(logits, label) + weights.clustering[0] * clustering


def adversary_loss(plain: PlainSystem, batch: Any, weights: Any, rules: Any) -> Tensor:
    """Return L_D of a batch of one slot, with noise_d."""
    plain.vaes.eval()
    modalities = range(len(batch.x))
    latents, total = [], torch.zeros((), dtype=torch.float64)
    for m in modalities:
        with torch.no_grad():
            _, _, z = plain.vaes[m](batch.x[m][0], batch.noise_d[0, m])
        h = plain.discriminator.trunk(z)
        latents.append(z)
        total = total + class_terms(plain.discriminator.label(h), h, batch.label[0, m], weights)
        signs = (
            batch.signs[0, m] if rules.penalty_outputs == "each" else torch.ones(len(z), len(batch.x), dtype=z.dtype)
        )
        squares = squared_gradients(plain, m, batch.x[m][0], batch.noise_d[0, m], signs, rules.penalty_inputs)
        total = total + weights.penalty_weight[0] / 2 * mean(squares)
    return total + weights.adversarial[0] * _both(plain, torch.stack(latents), batch, weights, "discriminator")


def vae_loss(plain: PlainSystem, batch: Any, weights: Any, rules: Any) -> Tensor:
    """Return L_VAE of a batch of one slot, with noise_g."""
    plain.vaes.train()
    latents, total = [], torch.zeros((), dtype=torch.float64)
    for m, vae in enumerate(plain.vaes):
        x = batch.x[m][0]
        mu, sigma, z = vae(x, batch.noise_g[0, m])
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        total = (
            total
            + F.mse_loss(vae.decoder(z), x)
            + weights.beta[0] * kl / (len(x) if rules.kl_reduction == "mean" else 1)
        )
        h = plain.discriminator.trunk(z)
        latents.append(z)
        total = total + class_terms(plain.discriminator.label(h), h, batch.label[0, m], weights)
    return total + weights.adversarial[0] * _both(plain, torch.stack(latents), batch, weights, "encoder")


def _both(plain: PlainSystem, z: Tensor, batch: Any, weights: Any, side: str) -> Tensor:
    h = plain.discriminator.trunk(z.flatten(0, 1))
    d, classes = (
        head(h).unflatten(0, z.shape[:2]) for head in (plain.discriminator.modality, plain.discriminator.label)
    )
    if weights.losses[0] == "paired":
        return paired(side, z, d, batch.sample[0])
    label = known_labels(classes, batch.label[0], float(weights.pseudo_label_threshold[0]))
    return adversarial(weights.losses[0], side, d, label)
