"""The two phases of a training step: which losses, on which tensors, with which weights.

Phase D trains the discriminator with frozen encoders; phase G trains the VAEs with a frozen discriminator (paper,
equations 1 and 2). Independent of optimisers, data sets and configuration files.

Each rank runs the networks on its own rows and computes the latent losses on the global batch; averages divide by the
counts of the global batch. Networks use autocast if configured; losses, and networks that a gradient penalty
differentiates, never do.

Legend: r slots of a stack, m modalities, b rows of the global batch, n rows of all modalities on this rank, p features,
l latent dimensions, k classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modis_dist.distributed import ALONE, World
from modis_dist.losses.clustering import clustering
from modis_dist.losses.labels import labelled_cross_entropy
from modis_dist.losses.latents import Latents
from modis_dist.losses.table import ADVERSARIAL
from modis_dist.losses.vae import kl_divergence
from modis_dist.model.networks import DiscriminatorOutput, Modis, Side


@dataclass(frozen=True)
class Batch:
    """One global batch; ``x`` has this rank's rows only, and label -1 means unlabelled.

    ``sample`` is an integer code of each row's ``sample_id``: rows of one slot with equal codes were measured on the
    same sample, in any modality. Samples of one group (patient) have different codes: they may differ, like tumour and
    normal tissue. Noise is standard normal, drawn separately for each phase.
    """

    x: tuple[Float[Tensor, "r _ _"], ...]  # one entry per modality, each with its own number of features
    label: Int[Tensor, "r m b"]
    sample: Int[Tensor, "r m b"]
    noise_d: Float[Tensor, "r m b l"]
    noise_g: Float[Tensor, "r m b l"]
    signs: Float[Tensor, "r m b m"] | None = None  # +-1, for penalty "each"


@dataclass(frozen=True)
class Weights:
    """Loss weights, which may differ between slots of one stack; every tensor but the prior is [r]."""

    beta: Float[Tensor, " r"]
    adversarial: Float[Tensor, " r"]
    penalty_weight: Float[Tensor, " r"]
    classification: Float[Tensor, " r"]
    clustering: Float[Tensor, " r"]
    pseudo_label_threshold: Float[Tensor, " r"]
    prior: Float[Tensor, "r k"]
    losses: tuple[str, ...]  # adversarial loss of each slot, a key of ``ADVERSARIAL``

    # Cached: computing each of these synchronises with the GPU.

    @cached_property
    def any_penalised(self) -> bool:
        """True if any slot has a gradient penalty."""
        return bool((self.penalty_weight > 0).any())

    @cached_property
    def slots(self) -> dict[str, Int[Tensor, " _"]]:
        """Slots by kind of adversarial loss, on the device."""
        slots = {kind: [r for r, name in enumerate(self.losses) if name == kind] for kind in sorted(set(self.losses))}
        return {kind: torch.tensor(positions, device=self.beta.device) for kind, positions in slots.items()}


@dataclass(frozen=True)
class Rules:
    """Settings of the objective that all slots of one stack share."""

    kl_reduction: Literal["sum", "mean"] = "sum"
    penalty_outputs: Literal["sum", "each"] = "sum"
    penalty_inputs: Literal["x", "z"] = "x"
    autocast_dtype: torch.dtype | None = None  # of the networks; None: the parameters' own


@dataclass
class Terms:
    """Unweighted parts of a phase's loss by name, each [r] or, per modality, [r, m], and their weighted total [r].

    This rank differentiates ``loss``. ``parts`` and ``total`` are its contributions: their sums over ranks are the
    values for the global batch.
    """

    loss: Float[Tensor, " r"]
    world: World = ALONE
    parts: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | float = 0.0

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0, *, shared: bool = False) -> None:
        """Add a term of this rank's rows or, if ``shared``, of the global batch, which rank 0 reports for all ranks.

        The total includes the sum of a per-modality term over modalities.
        """
        counted = not shared or self.world.rank == 0
        weighted = weight * (value.sum(1) if value.dim() == 2 else value)
        self.loss = self.loss + weighted
        self.parts[name] = value.detach() if counted else torch.zeros_like(value)
        self.total = self.total + (weighted.detach() if counted else torch.zeros_like(weighted))


@contextmanager
def frozen(side: Side) -> Iterator[None]:
    """Freeze one side: its parameters get no gradients, and it normalises by its running statistics."""
    training = [norm.training for norm in side.norms]
    for parameter in side.parameters:
        parameter.requires_grad_(False)
    for norm in side.norms:
        norm.training = False
    try:
        yield
    finally:
        for parameter in side.parameters:
            parameter.requires_grad_(True)
        for norm, before in zip(side.norms, training, strict=True):
            norm.training = before


def adversary_phase(model: Modis, batch: Batch, weights: Weights, rules: Rules) -> Terms:
    """Return L_D (paper, equation 1) and its gradient penalty; gradients reach the discriminator only.

    The encoders run once, for both the losses and the penalty.
    """
    assert (rules.penalty_outputs == "each") == (batch.signs is not None), "random signs belong to the penalty `each`"
    world, penalised = model.world, weights.any_penalised
    through_x = rules.penalty_inputs == "x" and penalised
    sizes = [x.shape[1] for x in batch.x]
    with frozen(model.sides["vaes"]):
        with torch.no_grad(), _autocast(rules, batch, allowed=not through_x):
            noise = torch.split(world.local(batch.noise_d), sizes, 1)
            draws = [vae.sample_with_vjp(x, part) for vae, x, part in zip(model.vaes, batch.x, noise, strict=True)]  # type: ignore[operator]
        z = torch.cat([draw for draw, _ in draws], 1)
        if penalised:
            signs = z.new_ones(*z.shape[:2], len(batch.x)) if batch.signs is None else world.local(batch.signs)
            local, gradient = model.discriminator.with_input_gradient(z, signs)
        else:
            with _autocast(rules, batch):
                local = model.discriminator(z)
        terms = Terms(z.new_zeros(len(z)), world)
        _add_latent_terms(terms, _gathered(z, local, batch, weights, world), weights, side="discriminator")
        squares = z.new_zeros(len(z), len(batch.x))
        if penalised:
            gradients = torch.split(gradient, sizes, 1)
            if through_x:
                gradients = tuple(vjp(part) for (_, vjp), part in zip(draws, gradients, strict=True))
            squares = torch.stack([part.square().sum((1, 2)) for part in gradients], 1) / batch.label.shape[2]
        # Zero without a penalty: a slot reports the same terms alone and in a stack, and never 0 * infinity.
        terms.add(
            "penalty", torch.where(weights.penalty_weight[:, None] > 0, 0.5 * squares, 0.0), weights.penalty_weight
        )
    return terms


def vae_phase(model: Modis, batch: Batch, weights: Weights, rules: Rules) -> Terms:
    """Return L_VAE (paper, equation 2); gradients reach the VAEs only."""
    world, rows = model.world, batch.label.shape[2]
    sizes = [x.shape[1] for x in batch.x]
    noise = torch.split(world.local(batch.noise_g), sizes, 1)
    with frozen(model.sides["discriminator"]):
        with _autocast(rules, batch):
            outputs = [vae(x, part) for vae, x, part in zip(model.vaes, batch.x, noise, strict=True)]
            mu, logvar, z = (torch.cat([getattr(o, name) for o in outputs], 1) for name in ("mu", "logvar", "z"))
            local = model.discriminator(z)
        terms = Terms(z.new_zeros(len(z)), world)
        errors = [-2 * o.likelihood.log_prob(o.target).mean(-1).sum(1) for o in outputs]
        terms.add("reconstruction", torch.stack(errors, 1) / rows)
        kl = torch.stack([part.sum(1) for part in torch.split(kl_divergence(mu, logvar), sizes, 1)], 1)
        terms.add("kl", kl if rules.kl_reduction == "sum" else kl / rows, weights.beta)
        _add_latent_terms(terms, _gathered(z, local, batch, weights, world), weights, side="encoder")
    return terms


def _autocast(rules: Rules, batch: Batch, *, allowed: bool = True) -> torch.autocast:
    """Return an autocast context for ``rules.autocast_dtype``, disabled if that is None or if not ``allowed``."""
    dtype = rules.autocast_dtype if allowed else None
    return torch.autocast(batch.label.device.type, dtype=dtype, enabled=dtype is not None)


def _gathered(z: Tensor, local: DiscriminatorOutput, batch: Batch, weights: Weights, world: World) -> Latents:
    """Gather the latents and the discriminator's output for the global batch, in the precision of the losses."""
    parts = [part.to(batch.noise_d.dtype) for part in (z, local.h, local.modality, local.label)]
    z, h, logits, class_logits = world.gather(parts, *batch.label.shape[1:])
    return Latents(z, h, logits, class_logits, batch.label, batch.sample, weights.pseudo_label_threshold)


def _add_latent_terms(
    terms: Terms, latents: Latents, weights: Weights, *, side: Literal["discriminator", "encoder"]
) -> None:
    """Add the adversarial loss, and L_C and L_clustering of each modality."""
    suffix = "d" if side == "discriminator" else "g"
    terms.add(f"adversarial_{suffix}", _adversarial(latents, weights, side=side), weights.adversarial, shared=True)
    value = labelled_cross_entropy(latents.class_logits, latents.label)
    terms.add(f"class_{suffix}", value, weights.classification, shared=True)
    value = clustering(latents.class_logits.softmax(-1), latents.h, weights.prior.unsqueeze(1))
    terms.add(f"clustering_{suffix}", value, weights.clustering, shared=True)


def _adversarial(latents: Latents, weights: Weights, *, side: Literal["discriminator", "encoder"]) -> Tensor:
    """Return the adversarial loss [r] of each slot, by its kind."""
    losses: dict[str, Callable[[Latents], Tensor]] = {kind: getattr(ADVERSARIAL[kind], side) for kind in weights.slots}
    if len(losses) == 1:
        return losses[weights.losses[0]](latents)
    out = latents.logits.new_zeros(len(weights.losses))
    for kind, slots in weights.slots.items():
        out = out.index_copy(0, slots, losses[kind](latents.select(slots)))
    return out
