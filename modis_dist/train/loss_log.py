"""Losses of every step, kept on the device and copied to the host in windows of steps.

Non-finite losses are detected when a window is copied, up to one window late; the reported step and term are exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modis_dist.distributed import ALONE, World
from modis_dist.objective import Terms


@dataclass(frozen=True)
class NonFinite:
    """The first loss of a slot that is NaN or infinite."""

    slot: int
    update: int  # optimiser step, counted from 1
    term: str
    value: float

    def __str__(self) -> str:
        return f"step {self.update}: {self.term} is {self.value}"


class LossLog:
    """Sums of each slot's terms since the start of the epoch, and the steps of the current window."""

    def __init__(self, modalities: Sequence[str], *, slots: int, window: int, world: World = ALONE) -> None:
        self._world = world
        self._modalities = modalities
        self._window = window
        self._pending: list[torch.Tensor] = []
        self.names: list[str] = []
        self.sums: NDArray[np.float64] = np.zeros((slots, 0))
        self.steps = 0

    def record(self, *phases: Terms) -> None:
        """Add the unweighted terms and the totals of a step's phases; copies nothing to the host."""
        if not self.names:
            self.names = [name for phase in phases for name in self._names_of(phase)]
        if self.sums.shape[1] == 0:
            self.sums = np.zeros((len(self.sums), len(self.names)))
        columns = []
        for phase in phases:
            columns += [part if part.dim() == 2 else part.unsqueeze(1) for part in phase.parts.values()]
            columns.append(torch.as_tensor(phase.total).unsqueeze(1))
        self._pending.append(torch.cat(columns, 1))

    def full(self) -> bool:
        """Return True if the window is complete."""
        return len(self._pending) >= self._window

    def flush(self, *, update: int) -> list[NonFinite]:
        """Add the window, summed over ranks, to the sums; ``update`` is its last step.

        Returns the first non-finite loss of each affected slot, the same on every rank.
        """
        if not self._pending:
            return []
        values = self._world.sum(torch.stack(self._pending).double()).cpu().numpy()  # [steps, r, terms]
        first_update = update - len(self._pending) + 1
        self._pending.clear()
        self.sums = self.sums + values.sum(0)
        self.steps += len(values)
        return [
            self._first_non_finite(values, r, first_update)
            for r in range(values.shape[1])
            if not np.isfinite(values[:, r]).all()
        ]

    def means(self) -> list[dict[str, float]]:
        """Return each slot's mean of every term over the epoch so far, and reset the sums for the next epoch."""
        rows = [
            {f"train/{name}": float(value) for name, value in zip(self.names, row / max(self.steps, 1), strict=True)}
            for row in self.sums
        ]
        self.sums, self.steps = np.zeros_like(self.sums), 0
        return rows

    def state(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint within an epoch; flush the window first."""
        assert not self._pending, "flush before saving"
        return {"names": self.names, "sums": self.sums.tolist(), "steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what ``state`` returned."""
        self.names = list(state["names"])
        self.sums = np.array(state["sums"], np.float64).reshape(len(state["sums"]), len(self.names))
        self.steps = state["steps"]

    def without(self, dropped: Sequence[int]) -> None:
        """Drop slots."""
        self.sums = np.delete(self.sums, list(dropped), 0)

    def _names_of(self, phase: Terms) -> list[str]:
        names: list[str] = []
        for name, part in phase.parts.items():
            names += [f"{name}/{m}" for m in self._modalities] if part.dim() == 2 else [name]
        return [*names, "total_d" if "adversarial_d" in phase.parts else "total_g"]

    def _first_non_finite(self, values: NDArray[np.float64], slot: int, first_update: int) -> NonFinite:
        """Return the first non-finite step and its first such term, preferably one that names a modality."""
        non_finite = ~np.isfinite(values[:, slot])
        step = int(non_finite.any(1).argmax())
        terms = [int(term) for term in np.flatnonzero(non_finite[step])]
        term = next((t for t in terms if "/" in self.names[t]), terms[0])
        return NonFinite(slot, first_update + step, self.names[term], float(values[step, slot, term]))
