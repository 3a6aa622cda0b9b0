"""Recorders that count: CUDA graphs, and a stand-in for them where there is no GPU."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from modis_dist.objective import Terms
from modis_dist.train.cuda_graph import GraphRecorder


class Replays:
    """Runs a step again where a GPU would replay it: on the same tensors, into the same terms."""

    def __init__(self) -> None:
        self.aside_, self.recorded, self.replayed = 0, 0, 0
        self.refused = False

    def aside(self, step: Callable[[], Terms]) -> Terms:
        self.aside_ += 1
        return step()

    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        self.recorded += 1
        terms = Terms(torch.zeros(1))

        def run() -> None:
            write(step(), terms, first=not terms.parts)
            self.replayed += 1

        return run, terms


def write(found: Terms, place: Terms, *, first: bool) -> None:
    """Put terms where those of the first replay are, as a graph does."""
    if first:
        for field in fields(Terms):
            setattr(place, field.name, getattr(found, field.name))
        return
    pairs = [(found.loss, place.loss), *((value, place.parts[name]) for name, value in found.parts.items())]
    if isinstance(found.total, Tensor):
        pairs.append((found.total, place.total))  # type: ignore[arg-type]
    for new, old in pairs:
        old.copy_(new)


class Graphs(GraphRecorder):
    """CUDA graphs, counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.aside_, self.recorded, self.replayed = 0, 0, 0

    def aside(self, step: Callable[[], Terms]) -> Terms:
        self.aside_ += 1
        return super().aside(step)

    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        replay, terms = super().record(step)
        self.recorded += 1

        def run() -> None:
            replay()
            self.replayed += 1

        return run, terms
