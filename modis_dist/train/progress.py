"""How far one replicate is, and which of its epochs is the best."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from modis_dist.metrics import LOWER_IS_BETTER

Status = Literal["running", "done", "failed", "pruned"]


@dataclass
class Progress:
    """How far one replicate is, and its best validation so far; plain values, saved as JSON."""

    trial: str
    status: Status = "running"
    reason: str | None = None  # why it failed or was pruned
    best_value: float | None = None
    best_error: float | None = None  # reconstruction error of the same epoch, which decides between equals
    best_epoch: int | None = None  # epochs done when it was reached
    waited: int = 0  # validations since
    epochs: int = 0  # epochs done
    changes: list[str] = field(default_factory=list)  # of machine and software, each time it went on upon others
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch

    def validated(self, figures: Mapping[str, float], *, metric: str, margin: float) -> bool:
        """Take in the validation figures of the epoch just done; true where it is the best so far.

        An epoch that is better by no more than ``margin`` is waited past; of equals the one that reconstructs better is
        the best.
        """
        self.waited += 1
        value, error = figures.get(metric), figures.get("reconstruction_mse")
        if value is None:
            return False
        improved = improves(value, self.best_value, metric=metric, margin=margin)
        closer = error is not None and improves(error, self.best_error, metric="reconstruction_mse")
        if improved:
            self.waited = 0
        if improved or (value == self.best_value and closer):
            self.best_value, self.best_error, self.best_epoch = value, error, self.epochs
            return True
        return False


def improves(value: float, best: float | None, *, metric: str, margin: float = 0.0) -> bool:
    """Whether a metric's value is better than the best so far by more than a margin; what is not finite never is."""
    if not isfinite(value):
        return False
    if best is None:
        return True
    return value < best - margin if metric in LOWER_IS_BETTER else value > best + margin
