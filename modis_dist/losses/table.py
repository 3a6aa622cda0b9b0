"""Table of the adversarial losses that ``objective.adversarial_loss`` selects from.

To add a loss, write its two functions in a new file of this folder, and add them to ``ADVERSARIAL`` and their name to
``AdversarialLoss`` in ``config/run.py``.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from modis_dist.losses import adversarial
from modis_dist.losses.latents import Latents


class LossPair(NamedTuple):
    """Losses of the discriminator and of the encoders; each returns one value per slot."""

    discriminator: Callable[[Latents], Tensor]
    encoder: Callable[[Latents], Tensor]


ADVERSARIAL = {
    "published": LossPair(adversarial.published_discriminator, adversarial.published_encoder),
    "pairwise": LossPair(adversarial.pairwise_discriminator, adversarial.pairwise_encoder),
    "class_conditional": LossPair(adversarial.class_conditional_discriminator, adversarial.class_conditional_encoder),
    "cross_entropy": LossPair(adversarial.cross_entropy_discriminator, adversarial.cross_entropy_encoder),
}
