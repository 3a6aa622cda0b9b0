"""The VAE of one modality, the discriminator, and the system of both (paper, figure S1 and table S2).

Legend: r replicates, m modalities, b rows, p features, l latent dimensions, k classes, w last hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from modis_dist.model.layers import Hidden, Pullback, StackedLinear, with_pullback
from modis_dist.world import ALONE, World


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

    def encode(self, x: Float[Tensor, "r b p"]) -> tuple[Float[Tensor, "r b l"], Float[Tensor, "r b l"]]:
        """Mean and log variance of q(z|x)."""
        h = self.encoder(x)
        return self.mu(h), self.logvar(h)

    def latents_with_pullback(
        self, x: Float[Tensor, "r b p"], noise: Float[Tensor, "r b l"]
    ) -> tuple[Float[Tensor, "r b l"], Pullback]:
        """mu + sigma * noise outside training, and its derivative at ``x`` with that noise."""
        h, to_input = with_pullback(self.encoder, x)
        mu, logvar = (part.to(noise.dtype) for part in (self.mu(h), self.logvar(h)))
        moved = torch.exp(0.5 * logvar) * noise

        def pullback(gradient: Tensor) -> Tensor:
            return to_input(self.mu.pullback(gradient) + self.logvar.pullback(0.5 * moved * gradient))

        return mu + moved, pullback

    def decode(self, z: Float[Tensor, "r b l"]) -> Float[Tensor, "r b p"]:
        """Mean of p(x|z)."""
        x_hat: Tensor = self.decoder(z)
        return x_hat


@dataclass(frozen=True)
class Judgement:
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

    def forward(self, z: Float[Tensor, "r n l"]) -> Judgement:
        """Last hidden activations, modality logits and class logits."""
        h = self.trunk(z)
        return Judgement(h, self.modality(h), self.label(h))

    def with_pullback(self, z: Float[Tensor, "r n l"]) -> tuple[Judgement, Pullback]:
        """The same, and the derivative of the modality logits at ``z``."""
        h, to_latent = with_pullback(self.trunk, z)
        judgement = Judgement(h, self.modality(h), self.label(h))
        return judgement, lambda gradient: to_latent(self.modality.pullback(gradient))


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
