"""The two phases of a training step: which losses, on which tensors, with which weights.

Phase D teaches the discriminator while the encoders stand still; phase G teaches the VAEs while the discriminator
stands still (paper, equations 1 and 2). Nothing here knows optimisers, data sets or configuration files.

Legend: r replicates, m modalities, b rows, p features, l latent dimensions, k classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from modis_dist.losses import adversarial
from modis_dist.losses.clustering import clustering
from modis_dist.losses.labels import labelled_cross_entropy
from modis_dist.losses.vae import kl_divergence, squared_error
from modis_dist.model.networks import Judgement, Modis

AdversarialLoss = Literal["published", "pairwise", "class_conditional", "cross_entropy"]


@dataclass(frozen=True)
class Batch:
    """One global batch; label -1 is unlabelled. Noise is standard normal, a fresh draw for each phase."""

    x: tuple[Float[Tensor, "r b _"], ...]  # one entry per modality, each with its own number of features
    label: Int[Tensor, "r m b"]
    noise_d: Float[Tensor, "r m b l"]
    noise_g: Float[Tensor, "r m b l"]
    signs: Float[Tensor, "r m b m"] | None = None  # +-1, for penalty "each"


@dataclass(frozen=True)
class Weights:
    """What may differ between replicates of one stack; every tensor is [r] but the prior."""

    beta: Float[Tensor, " r"]
    adversarial: Float[Tensor, " r"]
    lambda_r: Float[Tensor, " r"]
    label: Float[Tensor, " r"]
    clustering: Float[Tensor, " r"]
    confidence: Float[Tensor, " r"]
    prior: Float[Tensor, "r k"]
    losses: tuple[AdversarialLoss, ...]  # of each replicate

    # Decided once, not in every step: on a GPU each of these would wait for the device.

    @cached_property
    def any_penalised(self) -> bool:
        """Whether a replicate has a gradient penalty."""
        return bool((self.lambda_r > 0).any())

    @cached_property
    def members(self) -> dict[AdversarialLoss, Int[Tensor, " _"]]:
        """Positions of the replicates of each kind of adversarial loss, on the device."""
        of_kind = {kind: [r for r, name in enumerate(self.losses) if name == kind] for kind in sorted(set(self.losses))}
        return {kind: torch.tensor(positions, device=self.beta.device) for kind, positions in of_kind.items()}


@dataclass(frozen=True)
class Rules:
    """What the replicates of one stack share."""

    kl_reduction: Literal["sum", "mean"] = "sum"
    penalty: Literal["sum", "each"] = "sum"
    penalty_on: Literal["x", "z"] = "x"


@dataclass
class Terms:
    """Named parts of a phase's loss, unweighted, each [r] or, per modality, [r, m]; and their weighted total [r]."""

    total: Float[Tensor, " r"]
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add a term; one given per modality is summed over modalities in the total."""
        self.parts[name] = value.detach()
        self.total = self.total + weight * (value.sum(1) if value.dim() == 2 else value)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module takes part in gradients inside; it is evaluated, not trained."""
    was_training = module.training
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(was_training).requires_grad_(True)


def adversary_phase(model: Modis, batch: Batch, weights: Weights, rules: Rules) -> Terms:
    """L_D (paper, equation 1) and its gradient penalty; gradients reach the discriminator only."""
    assert (rules.penalty == "each") == (batch.signs is not None), "random signs belong to the penalty `each`"
    penalised = weights.lambda_r > 0
    through_x = rules.penalty_on == "x" and weights.any_penalised
    with frozen(model.vaes):
        inputs = tuple(x.detach().requires_grad_(through_x) for x in batch.x)
        with torch.set_grad_enabled(through_x):
            encoded = _encode(model, inputs, batch.noise_d)
        z = encoded.detach().requires_grad_()
        judged = _judge(model, z)
        terms = Terms(z.new_zeros(len(z)))
        terms.add(
            "adversarial_d", _adversarial(judged, batch.label, weights, side="discriminator"), weights.adversarial
        )
        _add_class_terms(terms, judged, batch.label, weights, suffix="d")
        squares = z.new_zeros(z.shape[:2])
        if weights.any_penalised:
            gradient = adversarial.logit_gradient(judged.modality, z, batch.signs)
            squares = _squared_norms(gradient, encoded, inputs if through_x else None)
        # A replicate reports the same terms alone and beside others, and never 0 * infinity.
        terms.add("penalty", torch.where(penalised[:, None], 0.5 * squares, 0.0), weights.lambda_r)
    return terms


def vae_phase(model: Modis, batch: Batch, weights: Weights, rules: Rules) -> Terms:
    """L_VAE (paper, equation 2); gradients reach the VAEs only."""
    with frozen(model.discriminator):
        encodings = [vae.encode(x) for vae, x in zip(model.vaes, batch.x, strict=True)]  # type: ignore[operator]
        mu, logvar = (torch.stack(parts, 1) for parts in zip(*encodings, strict=True))
        z = mu + torch.exp(0.5 * logvar) * batch.noise_g
        decoded = [vae.decode(z[:, m]) for m, vae in enumerate(model.vaes)]  # type: ignore[operator]
        judged = _judge(model, z)
        terms = Terms(z.new_zeros(len(z)))
        errors = [squared_error(x, x_hat).mean(1) for x, x_hat in zip(batch.x, decoded, strict=True)]
        terms.add("reconstruction", torch.stack(errors, 1))
        rows = kl_divergence(mu, logvar)
        kl = rows.sum(-1) if rules.kl_reduction == "sum" else rows.mean(-1)
        terms.add("kl", kl, weights.beta)
        terms.add("adversarial_g", _adversarial(judged, batch.label, weights, side="encoder"), weights.adversarial)
        _add_class_terms(terms, judged, batch.label, weights, suffix="g")
    return terms


def _encode(model: Modis, inputs: Sequence[Tensor], noise: Tensor) -> Tensor:
    """Sampled latents [r, m, b, l]."""
    sampled = []
    for position, (vae, x) in enumerate(zip(model.vaes, inputs, strict=True)):
        mu, logvar = vae.encode(x)  # type: ignore[operator]
        sampled.append(mu + torch.exp(0.5 * logvar) * noise[:, position])
    return torch.stack(sampled, 1)


def _judge(model: Modis, z: Float[Tensor, "r m b l"]) -> Judgement:
    """The discriminator on the rows of all modalities in one call; outputs keep [r, m, b, ...]."""
    judged = model.discriminator(z.flatten(1, 2))
    shape = z.shape[1:3]
    return Judgement(*(part.unflatten(1, shape) for part in (judged.h, judged.modality, judged.label)))


def _add_class_terms(terms: Terms, judged: Judgement, label: Tensor, weights: Weights, *, suffix: str) -> None:
    """L_C and L_clustering, summed over modalities, the latter in full precision."""
    terms.add(f"class_{suffix}", labelled_cross_entropy(judged.label, label), weights.label)
    probability = judged.label.softmax(-1)
    value = clustering(probability, judged.h, weights.prior.unsqueeze(1))
    terms.add(f"clustering_{suffix}", value, weights.clustering)


def _adversarial(
    judged: Judgement, label: Tensor, weights: Weights, *, side: Literal["discriminator", "encoder"]
) -> Float[Tensor, " r"]:
    """The adversarial loss of each replicate, by the kind it was given."""
    needs_guesses = "class_conditional" in weights.losses
    known = _confident(judged, label, weights.confidence) if needs_guesses else label
    if len(weights.members) == 1:
        return _one_kind(weights.losses[0], judged.modality, known, side)
    out = judged.modality.new_zeros(len(weights.losses))
    for kind, members in weights.members.items():
        out = out.index_copy(0, members, _one_kind(kind, judged.modality[members], known[members], side))
    return out


def _one_kind(kind: AdversarialLoss, logits: Tensor, known: Tensor, side: str) -> Tensor:
    match kind, side:
        case "published", "discriminator":
            return adversarial.published_discriminator(logits)
        case "published", _:
            return adversarial.published_encoder(logits)
        case "pairwise", "discriminator":
            return adversarial.pairwise_discriminator(logits)
        case "pairwise", _:
            return adversarial.pairwise_encoder(logits)
        case "cross_entropy", "discriminator":
            return adversarial.cross_entropy_discriminator(logits)
        case "cross_entropy", _:
            return adversarial.cross_entropy_encoder(logits)
        case "class_conditional", "discriminator":
            return adversarial.class_conditional_discriminator(logits, known)
        case _:
            return adversarial.class_conditional_encoder(logits, known)


def _confident(judged: Judgement, label: Tensor, confidence: Tensor) -> Int[Tensor, "r m b"]:
    """The true class, or where unlabelled the predicted class if its probability reaches the confidence, else -1."""
    top, predicted = judged.label.detach().softmax(-1).max(-1)
    guess = torch.where(top >= confidence[:, None, None], predicted, -1)
    return torch.where(label >= 0, label, guess)


def _squared_norms(
    gradient: Float[Tensor, "r m b l"], encoded: Tensor, inputs: tuple[Tensor, ...] | None
) -> Float[Tensor, "r m"]:
    """Mean over rows of |gradient|^2, with respect to z, or carried back to x through the frozen encoders.

    The encoders run with running statistics here, so rows are independent and one product gives every row's gradient.
    """
    if inputs is None:
        return gradient.square().sum(-1).mean(-1)
    carried = torch.autograd.grad(encoded, inputs, grad_outputs=gradient, create_graph=True)
    return torch.stack([part.square().sum(-1).mean(-1) for part in carried], 1)
