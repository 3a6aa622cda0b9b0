"""A learner's step on a GPU as one graph: recorded once, replayed from then on without Python.

A small step is hundreds of kernels of a few microseconds, which a processor cannot start as fast as a GPU ends them.
Recorded, the whole of a step, its optimiser included, is started at once. What is recorded always reads and writes the
same memory, so a batch is copied there first, and the terms that come back hold until the next step.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights

Step = Callable[[Batch, Weights, Rules], Terms]
Recording = tuple[Callable[[], None], Terms]  # what runs the step again, and the terms it writes

WARM_UP = 3  # steps before recording, in which libraries allocate what they need once


class Captured:
    """A step that is recorded after a few, and again where sizes, weights or rules are others."""

    def __init__(self, step: Step, *, record: Callable[[Callable[[], Terms]], Recording] | None = None) -> None:
        self._step = step
        self._record = record or _record
        self._of: tuple[object, ...] = ()
        self._warm = 0
        self._held: Batch | None = None
        self._recording: Recording | None = None

    def __call__(self, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """The step on a batch; the terms hold until the next call."""
        of = (id(weights), rules, tuple(tensor.shape for tensor in _tensors(batch)))
        if of != self._of:
            self._of, self._weights = of, weights  # held, so that its id stays its own
            self._warm, self._recording = 0, None
        if self._recording is None and self._warm < WARM_UP:
            self._warm += 1
            return self._step(batch, weights, rules)
        if self._recording is None:
            held = self._held = _copy(batch)
            self._recording = self._record(lambda: self._step(held, weights, rules))
        assert self._held is not None
        for kept, given in zip(_tensors(self._held), _tensors(batch), strict=True):
            kept.copy_(given, non_blocking=True)
        run, terms = self._recording
        run()
        return terms


def _record(step: Callable[[], Terms]) -> Recording:
    """The CUDA graph of a step; recording does not run it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = step()
    return graph.replay, terms


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value


def _copy(batch: Batch) -> Batch:
    signs = None if batch.signs is None else batch.signs.clone()
    return replace(
        batch,
        x=tuple(x.clone() for x in batch.x),
        label=batch.label.clone(),
        noise_d=batch.noise_d.clone(),
        noise_g=batch.noise_g.clone(),
        signs=signs,
    )
