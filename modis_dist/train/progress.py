"""Progress of one member of a stack, and its best epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from modis_dist.metrics import LOWER_IS_BETTER

Status = Literal["running", "done", "failed", "pruned"]


@dataclass
class Progress:
    """Progress of one member and its best validation so far; plain values, saved as JSON."""

    trial: str
    status: Status = "running"
    reason: str | None = None  # of a failed or pruned member
    best_value: float | None = None
    best_error: float | None = None  # reconstruction error of the same epoch, the tie-breaker
    best_epoch: int | None = None  # epochs done when it was reached
    waited: int = 0  # validations since the best
    epochs: int = 0  # done
    changes: list[str] = field(default_factory=list)  # of hardware and software at each resume
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch

    def record_validation(self, metrics: Mapping[str, float], *, metric: str, margin: float) -> bool:
        """Update with the validation metrics of the last epoch; return whether it is the best so far.

        Improvements of at most ``margin`` do not count. Ties are broken by the lower reconstruction error.
        """
        self.waited += 1
        value, error = metrics.get(metric), metrics.get("reconstruction_mse")
        if value is None:
            return False
        improved = improves(value, self.best_value, metric=metric, margin=margin)
        lower_error = error is not None and improves(error, self.best_error, metric="reconstruction_mse")
        if improved:
            self.waited = 0
        if improved or (value == self.best_value and lower_error):
            self.best_value, self.best_error, self.best_epoch = value, error, self.epochs
            return True
        return False


def improves(value: float, best: float | None, *, metric: str, margin: float = 0.0) -> bool:
    """Return whether a value is finite and better than the best so far by more than a margin."""
    if not isfinite(value):
        return False
    if best is None:
        return True
    return value < best - margin if metric in LOWER_IS_BETTER else value > best + margin
