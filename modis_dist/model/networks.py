"""The VAE of one modality, the discriminator, and the whole system (paper, figure S1 and table S2).

Legend: r slots of a stack, m modalities, b rows, p features, l latent dimensions, k classes, w last hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from modis_dist.config.run import COUNTS
from modis_dist.distributed import ALONE, World
from modis_dist.model.layers import Hidden, StackedBatchNorm, StackedLinear
from modis_dist.model.likelihood import Likelihood, as_input, likelihood, target

Vjp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """All sizes of a system; systems of the same shape can be stacked."""

    features: dict[str, int]  # modality -> features after preprocessing
    hidden: dict[str, tuple[int, ...]]  # modality -> encoder widths h_1 .. h_n
    latent: int
    classes: int
    discriminator: tuple[int, ...] = (1024, 512, 256)
    eps: float = 0.8
    slope: float = 0.2
    likelihood: dict[str, str] = field(default_factory=dict)  # modality -> kind; gaussian by default


def widths(features: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Return the hidden widths int(p * ratio), as published, but at least 1."""
    return tuple(max(1, int(features * ratio)) for ratio in ratios)


@dataclass(frozen=True)
class VaeOutput:
    """Mean and log variance of q(z|x), a sample of z, p(x|z), and the values that it scores."""

    mu: Float[Tensor, "r b l"]
    logvar: Float[Tensor, "r b l"]
    z: Float[Tensor, "r b l"]
    likelihood: Likelihood
    target: Float[Tensor, "r b p"]


class Vae(nn.Module):
    """Encoder to (mu, logvar) and decoder of one modality."""

    library: Tensor

    def __init__(
        self,
        slots: int,
        features: int,
        hidden: Sequence[int],
        latent: int,
        *,
        eps: float,
        slope: float,
        kind: str = "gaussian",
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.kind, self.counts = kind, kind in COUNTS  # of the likelihood

        def hidden_layer(i: int, o: int) -> Hidden:
            return Hidden(slots, i, o, eps=eps, slope=slope, world=world)

        down = [features, *hidden]
        up = [latent, *reversed(hidden)]
        self.encoder = nn.Sequential(
            *(hidden_layer(i, o) for i, o in pairwise(down[:-1])), StackedLinear(slots, down[-2], down[-1])
        )
        self.mu = StackedLinear(slots, down[-1], latent)
        self.logvar = StackedLinear(slots, down[-1], latent)
        self.decoder = nn.Sequential(
            *(hidden_layer(i, o) for i, o in pairwise(up)), StackedLinear(slots, up[-1], features)
        )
        if self.counts:
            self.register_buffer("library", torch.ones(slots, 1))  # of the median training row
        self.log_theta: nn.Parameter | None = None  # dispersion
        if kind == "negative_binomial":
            self.log_theta = nn.Parameter(torch.zeros(slots, features))

    def forward(self, x: Float[Tensor, "r b p"], noise: Float[Tensor, "r b l"]) -> VaeOutput:
        """Encode rows, sample z = mu + sigma * noise and decode it, under the caller's ``torch.autocast``."""
        mu, logvar = (part.to(noise.dtype) for part in self.encode(x))
        z = mu + torch.exp(0.5 * logvar) * noise
        observed = target(self.kind, x)
        return VaeOutput(mu, logvar, z, self.decode(z, self.library_of(x)), observed)

    def encode(self, x: Float[Tensor, "r b p"]) -> tuple[Float[Tensor, "r b l"], Float[Tensor, "r b l"]]:
        """Return mean and log variance of q(z|x)."""
        h = self.encoder(x.mT)
        return self.mu(h).mT, self.logvar(h).mT

    def sample_with_vjp(
        self, x: Float[Tensor, "r b p"], noise: Float[Tensor, "r b l"]
    ) -> tuple[Float[Tensor, "r b l"], Vjp]:
        """Return z = mu + sigma * noise in eval mode, and the vector-Jacobian product function of that map at ``x``."""
        hidden = [x.mT]
        for layer in self.encoder:
            hidden.append(layer(hidden[-1]))
        mu, logvar = self.mu(hidden[-1]), self.logvar(hidden[-1])
        deviation = torch.exp(0.5 * logvar) * noise.mT
        z = (mu + deviation).to(noise.dtype).mT
        return z, partial(self._vjp, hidden[1:], deviation)

    def _vjp(
        self, hidden: Sequence[Tensor], deviation: Tensor, gradient: Float[Tensor, "r b l"]
    ) -> Float[Tensor, "r b p"]:
        gradient = gradient.mT
        rows = self.mu.vjp(gradient) + self.logvar.vjp(0.5 * deviation * gradient)
        *layers, last = self.encoder
        return input_gradient(layers, hidden, last.vjp(rows)).mT  # type: ignore[operator]

    def library_of(self, x: Float[Tensor, "r b p"]) -> Float[Tensor, "r b 1"] | None:
        """Return the library size (total count) of rows, or None if the likelihood is not for counts."""
        return target(self.kind, x).sum(-1, keepdim=True) if self.counts else None

    def decode(self, z: Float[Tensor, "r b l"], library: Float[Tensor, "r b 1"] | None = None) -> Likelihood:
        """Return p(x|z) in the precision of ``z``; ``library`` defaults to that of the median training row."""
        if self.counts and library is None:
            library = self.library.unsqueeze(1)
        log_theta = None if self.log_theta is None else self.log_theta.unsqueeze(1)
        return likelihood(self.kind, self.decoder(z.mT).mT.to(z.dtype), library, log_theta)

    def reconstruct(
        self, z: Float[Tensor, "r b l"], library: Float[Tensor, "r b 1"] | None = None
    ) -> Float[Tensor, "r b p"]:
        """Return the mean of p(x|z) on the scale of the encoder's input; see ``decode``."""
        return as_input(self.kind, self.decode(z, library).mean)


def input_gradient(layers: Sequence[nn.Module], hidden: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Backpropagate a gradient from the output of ``layers`` to their input, given the activations of each layer."""
    for layer, h in zip(reversed(layers), reversed(hidden[: len(layers)]), strict=True):
        gradient = layer.vjp(gradient, h)  # type: ignore[operator]
    return gradient


@dataclass(frozen=True)
class DiscriminatorOutput:
    """Output for latents; g: slots, then rows of one or of every modality."""

    h: Float[Tensor, "*g w"]
    modality: Float[Tensor, "*g m"]  # logits
    label: Float[Tensor, "*g k"]  # logits


class Discriminator(nn.Module):
    """Shared trunk on z, a modality head and a class head."""

    def __init__(
        self, slots: int, latent: int, hidden: Sequence[int], *, modalities: int, classes: int, slope: float
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(Hidden(slots, i, o, eps=None, slope=slope) for i, o in pairwise([latent, *hidden]))
        )
        self.modality = StackedLinear(slots, hidden[-1], modalities)
        self.label = StackedLinear(slots, hidden[-1], classes)

    def forward(self, z: Float[Tensor, "r n l"]) -> DiscriminatorOutput:
        """Return the last hidden activations, modality logits and class logits."""
        return self._output(self.trunk(z.mT))

    def with_input_gradient(
        self, z: Float[Tensor, "r n l"], signs: Float[Tensor, "r n m"]
    ) -> tuple[DiscriminatorOutput, Float[Tensor, "r n l"]]:
        """Return the output, and the gradient at ``z`` of each row's sum of modality logits times ``signs``.

        The discriminator is piecewise linear: the gradient is a product of weights and constant slopes, which autograd
        differentiates without a double backward.
        """
        hidden = [z.mT]
        for layer in self.trunk:
            hidden.append(layer(hidden[-1]))
        gradient = input_gradient([*self.trunk], hidden[1:], self.modality.vjp(signs.mT))
        return self._output(hidden[-1]), gradient.mT

    def _output(self, h: Tensor) -> DiscriminatorOutput:
        return DiscriminatorOutput(h.mT, self.modality(h).mT, self.label(h).mT)


@dataclass(frozen=True)
class Side:
    """Parameters and batch normalisations of the VAEs or the discriminator, cached: walking the modules takes time."""

    parameters: tuple[nn.Parameter, ...]
    norms: tuple[StackedBatchNorm, ...]


def _side(networks: nn.Module) -> Side:
    norms = tuple(layer for layer in networks.modules() if isinstance(layer, StackedBatchNorm))
    return Side(tuple(networks.parameters()), norms)


class Modis(nn.Module):
    """One VAE per modality and the discriminator, for R slots; every rank holds the whole model."""

    def __init__(
        self, shape: Shape, *, slots: int = 1, dtype: torch.dtype = torch.float32, world: World = ALONE
    ) -> None:
        super().__init__()
        self.world = world
        self.shape = shape
        self.modalities = tuple(shape.features)
        self.vaes = nn.ModuleList(
            Vae(
                slots,
                p,
                shape.hidden[m],
                shape.latent,
                eps=shape.eps,
                slope=shape.slope,
                kind=shape.likelihood.get(m, "gaussian"),
                world=world,
            )
            for m, p in shape.features.items()
        )
        self.discriminator = Discriminator(
            slots,
            shape.latent,
            shape.discriminator,
            modalities=len(shape.features),
            classes=shape.classes,
            slope=shape.slope,
        )
        self.to(dtype)
        self.sides = {"vaes": _side(self.vaes), "discriminator": _side(self.discriminator)}

    def vae(self, modality: str) -> Vae:
        """Return the VAE of a modality."""
        vae = self.vaes[self.modalities.index(modality)]
        assert isinstance(vae, Vae)
        return vae
