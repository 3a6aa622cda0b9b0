"""Plain implementation of the published training, as the baseline of the measurements.

Ordinary layers, a loop over modalities, vectorised within each; per-modality DataLoaders over per-row data sets; one
Adam for everything. In the discriminator's step the encoders' graph is kept with their parameters' gradients, which are
then thrown away, and rows are encoded once for the losses and once more for the penalty. Every term of every step
becomes a Python number. Nothing of the package's layers, losses or loop is used.

Legend: b rows of one modality, p features, l latent dimensions, m modalities, k classes, w last hidden width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from modis_dist.model.networks import Shape
from tools.bench.shapes import Loss, Setting

SMALLEST = 1e-9

# --- networks -----------------------------------------------------------------------------------------------


def _hidden(inputs: int, outputs: int, shape: Shape) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, eps=shape.eps), nn.LeakyReLU(shape.slope)]


class Vae(nn.Module):
    """The VAE of one modality."""

    def __init__(self, shape: Shape, modality: str) -> None:
        super().__init__()
        down = [shape.features[modality], *shape.hidden[modality]]
        up = [shape.latent, *reversed(shape.hidden[modality])]
        layers = chain.from_iterable(_hidden(i, o, shape) for i, o in pairwise(down[:-1]))
        self.encoder = nn.Sequential(*layers, nn.Linear(down[-2], down[-1]))
        self.mu = nn.Linear(down[-1], shape.latent)
        self.logvar = nn.Linear(down[-1], shape.latent)
        layers = chain.from_iterable(_hidden(i, o, shape) for i, o in pairwise(up))
        self.decoder = nn.Sequential(*layers, nn.Linear(up[-1], down[0]))

    def encode(self, x: Float[Tensor, "b p"]) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b l"]]:
        """Return mean and log variance."""
        h = self.encoder(x)
        return self.mu(h), self.logvar(h)


class Discriminator(nn.Module):
    """A trunk with a head for the modality and one for the class."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = [shape.latent, *shape.discriminator]
        layers = chain.from_iterable((nn.Linear(i, o), nn.LeakyReLU(shape.slope)) for i, o in pairwise(sizes))
        self.trunk = nn.Sequential(*layers)
        self.modality = nn.Linear(sizes[-1], len(shape.features))
        self.label = nn.Linear(sizes[-1], shape.classes)

    def forward(
        self, z: Float[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b m"], Float[Tensor, "b k"]]:
        """Return last hidden activations, modality logits and class logits."""
        h = self.trunk(z)
        return h, self.modality(h), self.label(h)


# --- losses (paper, supplement A.2) -------------------------------------------------------------------------


def sample(mu: Tensor, logvar: Tensor, noise: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """Return one latent sample per row."""
    return mu.to(noise.dtype) + torch.exp(0.5 * logvar.to(noise.dtype)) * noise


def kl_divergence(mu: Float[Tensor, "b l"], logvar: Float[Tensor, "b l"]) -> Float[Tensor, ""]:
    """Return the KL divergence summed over rows and latent dimensions, as in the published code."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def class_loss(logits: Float[Tensor, "b k"], label: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the labelled rows; 0 without labelled rows."""
    total = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    return total / (label >= 0).sum().clamp(min=1)


def clustering(a: Float[Tensor, "b k"], h: Float[Tensor, "b w"]) -> Float[Tensor, ""]:
    """Return the sum of the three terms on class probabilities and hidden activations."""
    corner = torch.eye(a.shape[1], device=a.device, dtype=a.dtype)
    similarity = _kernel(h)
    to_corner = torch.exp(-_squared_distances(a, corner))
    share = a.mean(0)
    return _overlap(a, similarity) + _overlap(to_corner, similarity) + (share * share.clamp(min=SMALLEST).log()).sum()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.pow(2).sum(1, keepdim=True) - 2 * x @ y.T + y.pow(2).sum(1)
    return squares.clamp(min=0)


def _kernel(h: Float[Tensor, "b w"]) -> Float[Tensor, "b b"]:
    squares = _squared_distances(h, h)
    bandwidth = (0.15 * squares.detach().median()).clamp(min=SMALLEST)
    return torch.exp(-squares / (2 * bandwidth))


def _overlap(a: Float[Tensor, "b k"], similarity: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    gram = a.T @ similarity @ a
    size = gram.diagonal()
    ratio = gram / torch.sqrt((size.unsqueeze(1) * size).clamp(min=SMALLEST**2))
    classes = a.shape[1]
    return 2 / (classes * (classes - 1)) * torch.triu(ratio, diagonal=1).sum()


def adversarial(d: Sequence[Float[Tensor, "b m"]], *, loss: Loss, side: str) -> Float[Tensor, ""]:
    """Return the loss on the modality logits ``d``, one tensor for the rows of each modality."""
    modalities = range(len(d))
    pairs = [(i, j) for i in modalities for j in modalities if i != j]
    if loss == "pairwise":
        sign = -1 if side == "discriminator" else 1
        return sum_of(F.softplus(sign * (d[i][:, i] - d[j][:, i])).mean() for i, j in pairs) / len(pairs)
    if side == "discriminator":
        total = sum_of(d[i] - sum_of(d[j] for j in modalities if j != i) for i in modalities)
    else:
        total = sum_of(d[j] - d[i] for i, j in pairs)
    return F.softplus(-total).mean()


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors."""
    return torch.stack(list(parts)).sum(0)


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainBatch:
    """One entry per modality; noise is standard normal, a fresh draw for each phase; label -1 is unlabelled."""

    x: Sequence[Float[Tensor, "b _"]]
    label: Sequence[Int[Tensor, " b"]]
    noise_d: Sequence[Float[Tensor, "b l"]]
    noise_g: Sequence[Float[Tensor, "b l"]]


class Terms:
    """Named, unweighted terms of a phase and their weighted total."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.total: Tensor | float = 0.0

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Add a term."""
        self.values[name] = value
        self.total = self.total + weight * value


class Baseline(nn.Module):
    """The whole system with its optimiser; settings of table S3."""

    def __init__(self, setting: Setting, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.setting = setting
        shape = setting.case.shape
        self.modalities = list(shape.features)
        self.vaes = nn.ModuleList(Vae(shape, modality) for modality in self.modalities)
        self.discriminator = Discriminator(shape)
        self.to(setting.device, dtype)
        self.optimiser = torch.optim.Adam(self.parameters(), lr=1e-4, betas=(0.5, 0.999))

    def vae(self, m: int) -> Vae:
        """Return the VAE of a modality by position."""
        vae = self.vaes[m]
        assert isinstance(vae, Vae)
        return vae

    def learn(self, batch: PlainBatch) -> dict[str, float]:
        """Run both phases of a step; return the value of every term."""
        return self.discriminator_step(batch) | self.vae_step(batch)

    def discriminator_step(self, batch: PlainBatch) -> dict[str, float]:
        """Update the discriminator, with the encoders in eval mode; their gradients are dropped."""
        self.vaes.eval()
        terms, logits = Terms(), []
        for m, (x, label, noise) in enumerate(zip(batch.x, batch.label, batch.noise_d, strict=True)):
            z = sample(*self.vae(m).encode(x), noise)
            h, modality, classes = self.discriminator(z)
            logits.append(modality)
            self._add_class_terms(terms, h, classes, label, name=f"d/{self.modalities[m]}")
            terms.add(f"penalty/{self.modalities[m]}", self._penalty(m, x, noise), self.setting.case.penalty_weight)
        terms.add("adversarial_d", adversarial(logits, loss=self.setting.loss, side="discriminator"))
        return self._take_step(terms, forget=self.vaes)

    def vae_step(self, batch: PlainBatch) -> dict[str, float]:
        """Update the VAEs; the gradients of the discriminator are dropped."""
        self.vaes.train()
        terms, logits = Terms(), []
        for m, (x, label, noise) in enumerate(zip(batch.x, batch.label, batch.noise_g, strict=True)):
            name, vae, autocast_dtype = self.modalities[m], self.vae(m), self.setting.autocast_dtype
            with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                mu, logvar = vae.encode(x)
                z = sample(mu, logvar, noise)
                x_hat = vae.decoder(z)
                predicted = self.discriminator(z)
            h, modality, classes = (part.to(x.dtype) for part in predicted)
            logits.append(modality)
            terms.add(f"reconstruction/{name}", F.mse_loss(x_hat.to(x.dtype), x))
            terms.add(f"kl/{name}", kl_divergence(mu.to(x.dtype), logvar.to(x.dtype)), self.setting.case.beta)
            self._add_class_terms(terms, h, classes, label, name=f"g/{name}")
        terms.add("adversarial_g", adversarial(logits, loss=self.setting.loss, side="encoder"))
        return self._take_step(terms, forget=self.discriminator)

    def _penalty(self, m: int, x: Tensor, noise: Tensor) -> Tensor:
        """Return half the mean squared gradient of the summed logits with respect to x, through the encoder."""
        x = x.clone().requires_grad_()
        _, modality, _ = self.discriminator(sample(*self.vae(m).encode(x), noise))
        (gradient,) = torch.autograd.grad(modality.sum(), x, create_graph=True)
        return 0.5 * gradient.pow(2).sum(1).mean()

    def _add_class_terms(self, terms: Terms, h: Tensor, classes: Tensor, label: Tensor, *, name: str) -> None:
        terms.add(f"class_{name}", class_loss(classes, label))
        terms.add(f"clustering_{name}", clustering(classes.softmax(1), h))

    def _take_step(self, terms: Terms, *, forget: nn.Module) -> dict[str, float]:
        assert isinstance(terms.total, Tensor)
        self.optimiser.zero_grad()
        terms.total.backward()  # type: ignore[no-untyped-call]
        for parameter in forget.parameters():
            parameter.grad = None
        self.optimiser.step()
        return {name: value.item() for name, value in terms.values.items()}


# --- data ---------------------------------------------------------------------------------------------------


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Data set of the rows of one modality, in host memory."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.x, self.label = x, label

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.label[row]


Loaders = Sequence[DataLoader[tuple[Tensor, Tensor]]]


def loaders(parts: Iterable[tuple[Tensor, Tensor]], *, batch: int) -> Loaders:
    """Return one DataLoader per modality, reshuffled every epoch; the last incomplete batch is dropped."""
    return [DataLoader(Rows(x, label), batch_size=batch, shuffle=True, drop_last=True) for x, label in parts]


def train_epoch(system: Baseline, given: Loaders) -> dict[str, float]:
    """Train until the shortest modality is exhausted; return the mean of every term."""
    device, sums, steps = system.setting.device, dict[str, float](), 0
    for parts in zip(*given, strict=False):
        x = [features.to(device) for features, _ in parts]
        label = [labels.to(device) for _, labels in parts]
        noise = [[torch.randn(len(rows), system.setting.case.shape.latent, device=device) for rows in x] for _ in "dg"]
        for name, value in system.learn(PlainBatch(x, label, *noise)).items():
            sums[name] = sums.get(name, 0.0) + value
        steps += 1
    return {name: total / steps for name, total in sums.items()}
