"""Input of the losses that couple rows of several modalities.

Legend: r slots of a stack, m modalities, b rows of the global batch, l latent dimensions, w last hidden width of the
discriminator, k classes.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """Latents of a global batch and the discriminator's output for them; rows of all ranks.

    Rows of one slot with equal ``sample`` codes were measured on the same sample, in any modality.
    """

    z: Float[Tensor, "r m b l"]
    h: Float[Tensor, "r m b w"]  # last hidden activations of the discriminator
    logits: Float[Tensor, "r m b m"]  # of the critics, one per modality
    class_logits: Float[Tensor, "r m b k"]
    label: Int[Tensor, "r m b"]  # class codes, -1 if unknown
    sample: Int[Tensor, "r m b"]
    pseudo_label_threshold: Float[Tensor, " r"]

    def select(self, slots: Int[Tensor, " s"]) -> "Latents":
        """Return the latents of some slots."""
        return Latents(*(getattr(self, field.name).index_select(0, slots) for field in fields(self)))

    def predicted_labels(self) -> Int[Tensor, "r m b"]:
        """Return the labels; unlabelled rows get the predicted class if its probability reaches the threshold."""
        top, predicted = self.class_logits.detach().softmax(-1).max(-1)
        guess = torch.where(top >= self.pseudo_label_threshold[:, None, None], predicted, -1)
        return torch.where(self.label >= 0, self.label, guess)
