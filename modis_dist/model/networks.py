"""The VAE of one modality, the discriminator, and the system of both (paper, figure S1 and table S2).

Legend: r replicates, m modalities, b rows, p features, l latent dimensions, k classes, w last hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from modis_dist.distributed import ALONE, World
from modis_dist.model.layers import Hidden, LinearMap, StackedLinear, flat
from modis_dist.model.nodes import Network


@dataclass(frozen=True)
class Shape:
    """Every size of a system; two systems of one shape can be stacked."""

    features: dict[str, int]  # modality -> features after preprocessing
    hidden: dict[str, tuple[int, ...]]  # modality -> encoder widths h_1 .. h_n
    latent: int
    classes: int
    discriminator: tuple[int, ...] = (1024, 512, 256)
    eps: float = 0.8
    slope: float = 0.2


def widths(features: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Hidden widths int(p * ratio), as published; at least 1."""
    return tuple(max(1, int(features * ratio)) for ratio in ratios)


class Vae(nn.Module):
    """Encoder to (mu, logvar) and decoder of one modality."""

    def __init__(
        self,
        replicates: int,
        features: int,
        hidden: Sequence[int],
        latent: int,
        *,
        eps: float,
        slope: float,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        super().__init__()

        def hidden_layer(i: int, o: int) -> Hidden:
            return Hidden(replicates, i, o, eps=eps, slope=slope, dtype=dtype, world=world)

        down = [features, *hidden]
        up = [latent, *reversed(hidden)]
        self.encoder = nn.Sequential(
            *(hidden_layer(i, o) for i, o in pairwise(down[:-1])),
            StackedLinear(replicates, down[-2], down[-1], dtype=dtype),
        )
        self.mu = StackedLinear(replicates, down[-1], latent, dtype=dtype)
        self.logvar = StackedLinear(replicates, down[-1], latent, dtype=dtype)
        self.decoder = nn.Sequential(
            *(hidden_layer(i, o) for i, o in pairwise(up)),
            StackedLinear(replicates, up[-1], features, dtype=dtype),
        )
        self._encoding = Network([*self.encoder], [self.mu, self.logvar])
        self._decoding = Network([*self.decoder])

    def encode(self, x: Float[Tensor, "r b p"]) -> tuple[Float[Tensor, "r b l"], Float[Tensor, "r b l"]]:
        """Mean and log variance of q(z|x)."""
        _, mu, logvar = self._encoding.trained(x) if self.training else self._encoding.evaluated(x)
        return mu, logvar

    def linearised(
        self, x: Float[Tensor, "r b p"], noise: Float[Tensor, "r b l"]
    ) -> tuple[Float[Tensor, "r b l"], LinearMap, LinearMap]:
        """mu + sigma * noise outside training, and its derivative at ``x`` both ways, as maps of ``flat`` rows."""
        pulls: list[LinearMap] = []
        pushes: list[LinearMap] = []
        rows = flat(x)
        for layer in self._encoding.layers:
            rows, pull, push = layer.linearised(rows)
            pulls.append(pull)
            pushes.append(push)
        mu, mu_pull, mu_push = self.mu.linearised(rows)
        logvar, logvar_pull, logvar_push = self.logvar.linearised(rows)
        moved = torch.exp(0.5 * logvar) * flat(noise)
        slope = 0.5 * moved  # of z with respect to logvar
        back = partial(_pulled, pulls, mu_pull, logvar_pull, slope)
        return (mu + moved).view_as(noise), back, partial(_pushed, pushes, mu_push, logvar_push, slope)

    def decode(self, z: Float[Tensor, "r b l"]) -> Float[Tensor, "r b p"]:
        """Mean of p(x|z)."""
        (x_hat,) = self._decoding.trained(z) if self.training else self._decoding.evaluated(z)
        return x_hat


def _pulled(layers: Sequence[LinearMap], mu: LinearMap, logvar: LinearMap, slope: Tensor, gradient: Tensor) -> Tensor:
    gradient = mu(gradient) + logvar(slope * gradient)
    for pull in reversed(layers):
        gradient = pull(gradient)
    return gradient


def _pushed(layers: Sequence[LinearMap], mu: LinearMap, logvar: LinearMap, slope: Tensor, direction: Tensor) -> Tensor:
    for push in layers:
        direction = push(direction)
    return mu(direction) + slope * logvar(direction)


@dataclass(frozen=True)
class DiscriminatorOutput:
    """What the discriminator says of latents; g: replicates, then rows of one or of every modality."""

    h: Float[Tensor, "*g w"]
    modality: Float[Tensor, "*g m"]  # logits
    label: Float[Tensor, "*g k"]  # logits


class Discriminator(nn.Module):
    """Shared trunk on z, a modality head and a class head."""

    def __init__(
        self,
        replicates: int,
        latent: int,
        hidden: Sequence[int],
        *,
        modalities: int,
        classes: int,
        slope: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(Hidden(replicates, i, o, eps=None, slope=slope, dtype=dtype) for i, o in pairwise([latent, *hidden]))
        )
        self.modality = StackedLinear(replicates, hidden[-1], modalities, dtype=dtype)
        self.label = StackedLinear(replicates, hidden[-1], classes, dtype=dtype)
        self._judging = Network([*self.trunk], [self.modality, self.label])

    def forward(self, z: Float[Tensor, "r n l"]) -> DiscriminatorOutput:
        """Last hidden activations, modality logits and class logits."""
        return DiscriminatorOutput(*(self._judging.trained(z) if self.training else self._judging.evaluated(z)))

    def with_gradient(
        self, z: Float[Tensor, "r n l"], signs: Float[Tensor, "r n m"]
    ) -> tuple[DiscriminatorOutput, Float[Tensor, "r n l"]]:
        """The same, and each row's gradient at ``z`` of the sum of its modality logits times ``signs``."""
        *judged, gradient = self._judging.with_gradient(z, signs)
        return DiscriminatorOutput(*judged), gradient


class Modis(nn.Module):
    """One VAE per modality and the discriminator, for R replicates; on each rank of a world the whole of it."""

    def __init__(
        self, shape: Shape, *, replicates: int = 1, dtype: torch.dtype = torch.float32, world: World = ALONE
    ) -> None:
        super().__init__()
        self.world = world
        self.shape = shape
        self.modalities = tuple(shape.features)
        self.vaes = nn.ModuleList(
            Vae(
                replicates, p, shape.hidden[m], shape.latent, eps=shape.eps, slope=shape.slope, dtype=dtype, world=world
            )
            for m, p in shape.features.items()
        )
        self.discriminator = Discriminator(
            replicates,
            shape.latent,
            shape.discriminator,
            modalities=len(shape.features),
            classes=shape.classes,
            slope=shape.slope,
            dtype=dtype,
        )
        sides = {"vaes": self.vaes, "discriminator": self.discriminator}
        self.sides = {name: tuple(side.parameters()) for name, side in sides.items()}

    def vae(self, modality: str) -> Vae:
        """The VAE of a modality by name."""
        vae = self.vaes[self.modalities.index(modality)]
        assert isinstance(vae, Vae)
        return vae
