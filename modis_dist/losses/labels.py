"""Cross-entropy on the labelled rows of a batch (paper, A.2: L_C)."""

from jaxtyping import Float, Int
from torch import Tensor


def labelled_cross_entropy(logits: Float[Tensor, "*g b k"], label: Int[Tensor, "*g b"]) -> Float[Tensor, "*g"]:
    """Mean cross-entropy in nats over the labelled rows (label >= 0); 0 if there are none."""
    labelled = label >= 0
    log_prob = logits.log_softmax(-1).gather(-1, label.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(log_prob * labelled).sum(-1) / labelled.sum(-1).clamp_min(1)
