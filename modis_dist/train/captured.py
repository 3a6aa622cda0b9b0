"""A learner's step on a GPU as one graph: recorded once, replayed from then on without Python.

A small step is hundreds of kernels of a few microseconds, which a processor cannot start as fast as a GPU ends them.
Recorded, the whole of a step, its optimiser included, is started at once. What is recorded always reads and writes the
same memory, so a batch is copied there first, and the terms that come back hold until the next step.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights

Step = Callable[[Batch, Weights, Rules], Terms]

WARM_UP = 3  # steps before recording, in which libraries allocate what they need once


class Recorder(Protocol):
    """How a step is run before it is recorded, and recorded."""

    def aside(self, step: Callable[[], Terms]) -> Terms:
        """Run it where it will be recorded."""
        ...

    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        """What runs it again, and the terms that this writes; recording does not run it."""
        ...


class GraphRecorder:
    """CUDA graphs, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def aside(self, step: Callable[[], Terms]) -> Terms:
        """See ``Recorder.aside``."""
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            terms = step()
        around.wait_stream(self._stream)
        return terms

    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        """See ``Recorder.record``."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._stream.device), torch.cuda.graph(graph, stream=self._stream):
            terms = step()
        return graph.replay, terms


class Captured:
    """Steps that are recorded after a few, and anew where sizes, weights or rules are others.

    Holds nothing of who takes the steps, whose memory is then free as soon as it is dropped.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder = recorder
        self._refused = False
        self.forget()

    def forget(self) -> None:
        """Record anew, after a few steps more: what was recorded writes to memory that is no longer the learner's."""
        self._weights: Weights | None = None
        self._of: tuple[object, ...] = ()
        self._warm = 0
        self._held: tuple[Batch, Callable[[], object], Terms] | None = None

    def __call__(self, step: Step, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """The step on a batch; the terms hold until the next call. Raises what a step raises.

        Where a step cannot be recorded a warning says so, and steps are taken one by one.
        """
        of = (rules, tuple(tensor.shape for tensor in _tensors(batch)))
        if self._weights is not weights or of != self._of:
            self.forget()
            self._weights, self._of = weights, of
        if self._held is None and self._warm == WARM_UP and not self._refused:
            self._held = self._recorded(step, batch, weights, rules)
        if self._held is None:
            self._warm = min(self._warm + 1, WARM_UP)
            return self._recorder.aside(lambda: step(batch, weights, rules))
        held, replay, terms = self._held
        for kept, given in zip(_tensors(held), _tensors(batch), strict=True):
            kept.copy_(given, non_blocking=True)
        replay()
        return terms

    def _recorded(
        self, step: Step, batch: Batch, weights: Weights, rules: Rules
    ) -> tuple[Batch, Callable[[], object], Terms] | None:
        held = _copy(batch)
        try:
            return held, *self._recorder.record(lambda: step(held, weights, rules))
        except RuntimeError as error:
            self._refused = True
            logging.getLogger(__name__).warning("a step cannot be recorded, which is slower: %s", error)
            return None


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value


def _copy(batch: Batch) -> Batch:
    copied: dict[str, object] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        copied[field.name] = tuple(x.clone() for x in value) if isinstance(value, tuple) else value
        if isinstance(value, Tensor):
            copied[field.name] = value.clone()
    return Batch(**copied)  # type: ignore[arg-type]
