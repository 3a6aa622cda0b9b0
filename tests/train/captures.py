"""Counted captures: CUDA graphs, and a stand-in for machines without a GPU."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from modis_dist.objective import Terms
from modis_dist.train.cuda_graph import GraphCapture


class Replays:
    """Runs the step again for a replay: on the same tensors, into the same terms."""

    def __init__(self) -> None:
        self.warmed_up, self.captured, self.replayed = 0, 0, 0
        self.failed = False

    def warm_up(self, step: Callable[[], Terms]) -> Terms:
        self.warmed_up += 1
        return step()

    def capture(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        self.captured += 1
        terms = Terms(torch.zeros(1))

        def replay() -> None:
            write(step(), terms, first=not terms.parts)
            self.replayed += 1

        return replay, terms


def write(new: Terms, terms: Terms, *, first: bool) -> None:
    """Write terms to the tensors of the first replay, as a graph does."""
    if first:
        for field in fields(Terms):
            setattr(terms, field.name, getattr(new, field.name))
        return
    pairs = [(new.loss, terms.loss), *((value, terms.parts[name]) for name, value in new.parts.items())]
    if isinstance(new.total, Tensor):
        pairs.append((new.total, terms.total))  # type: ignore[arg-type]
    for source, buffer in pairs:
        buffer.copy_(source)


class Graphs(GraphCapture):
    """CUDA graphs, counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.warmed_up, self.captured, self.replayed = 0, 0, 0

    def warm_up(self, step: Callable[[], Terms]) -> Terms:
        self.warmed_up += 1
        return super().warm_up(step)

    def capture(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        graph_replay, terms = super().capture(step)
        self.captured += 1

        def replay() -> None:
            graph_replay()
            self.replayed += 1

        return replay, terms
