"""CUDA graph of a learner's step: captured once, then replayed without Python.

A small step is hundreds of kernels of a few microseconds, which a CPU launches more slowly than a GPU executes them.
Replaying the whole step, including the optimiser, is one launch. A graph always reads and writes the same memory, so
each batch is first copied to input buffers, shared by both learners, and the returned terms are valid until the next
step.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from typing import ClassVar, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights

Step = Callable[[Batch, Weights, Rules], Terms]

WARM_UP = 3  # steps before capture, in which libraries make their one-time allocations
CAPTURABLE_WARNING = "This instance was constructed with capturable=True"  # from the optimiser, during warm-up


class GraphCapture:
    """Captures steps as CUDA graphs on a separate stream."""

    _unfinished: ClassVar[list[torch.cuda.CUDAGraph]] = []  # kept alive: the allocator keeps using them

    def __init__(self, device: torch.device) -> None:
        self.failed = False  # after a failed capture, no other is attempted
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, step: Callable[[], Terms]) -> Terms:
        """Run a step on the stream on which it will be captured."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", CAPTURABLE_WARNING)
            terms = step()
        current.wait_stream(self._stream)
        return terms

    def capture(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        """Return a function that replays the step, and the terms that it writes. Capture does not run the step."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream; if capture fails, `torch.cuda.graph` does not.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
                terms = step()
        except RuntimeError:
            if not _has_ended(graph):
                self._unfinished.append(graph)
            raise
        return graph.replay, terms


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Return True if a failed capture was ended, as after an out-of-memory error; its memory can then be freed."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@cache
def capture_for(device: torch.device) -> GraphCapture | None:
    """Return the ``GraphCapture`` of a device, or None for devices without CUDA graphs.

    One per device: libraries and the allocator hold memory for every stream until the process ends.
    """
    return GraphCapture(device) if device.type == "cuda" else None


class Inputs:
    """Input buffers of captured steps, shared by both learners and filled once per batch."""

    def __init__(self) -> None:
        self._source: ReferenceType[Batch] | None = None
        self._buffers: Batch | None = None

    def fill(self, batch: Batch) -> Batch:
        """Copy a batch into the buffers and return them; a batch of other sizes gets new buffers."""
        if self._buffers is not None and self._source is not None and self._source() is batch:
            return self._buffers
        if self._buffers is None or _sizes(self._buffers) != _sizes(batch):
            self._buffers = _copy(batch)
        else:
            for buffer, source in zip(_tensors(self._buffers), _tensors(batch), strict=True):
                buffer.copy_(source, non_blocking=True)
        self._source = ref(batch)
        return self._buffers


class _Graph(NamedTuple):
    """A captured step that reads ``inputs`` and writes ``terms``."""

    inputs: Batch
    replay: Callable[[], object]
    terms: Terms


class CapturedStep:
    """Runs steps: the first few eagerly, then by replay; captures again when sizes, weights or rules change.

    Holds no reference to the learner, so that its memory is freed as soon as it is dropped.
    """

    def __init__(self, capture: GraphCapture, inputs: Inputs) -> None:
        self._capture = capture
        self._inputs = inputs
        self.invalidate()

    def invalidate(self) -> None:
        """Drop the graph, whose memory was freed; capture again after warm-up."""
        self._weights: Weights | None = None
        self._key: tuple[object, ...] = ()
        self._warm = 0
        self._graph: _Graph | None = None

    def __call__(self, step: Step, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """Run the step on a batch; the terms are valid until the next call. Raises what the step raises.

        If capture fails, a warning is logged and steps run eagerly.
        """
        key = (rules, _sizes(batch))
        if self._weights is not weights or key != self._key:
            self.invalidate()
            self._weights, self._key = weights, key
        if self._graph is not None or (self._warm == WARM_UP and not self._capture.failed):
            inputs = self._inputs.fill(batch)
            if self._graph is None or self._graph.inputs is not inputs:
                self._graph = None  # frees its memory for the next one
                self._graph = self._captured(step, inputs, weights, rules)
        if self._graph is None:
            self._warm = min(self._warm + 1, WARM_UP)
            return self._capture.warm_up(lambda: step(batch, weights, rules))
        self._graph.replay()
        return self._graph.terms

    def _captured(self, step: Step, inputs: Batch, weights: Weights, rules: Rules) -> _Graph | None:
        if self._capture.failed:
            return None
        try:
            return _Graph(inputs, *self._capture.capture(lambda: step(inputs, weights, rules)))
        except RuntimeError as error:
            self._capture.failed = True
            cause = error.__context__ or error  # closing a failed capture fails too, with a less useful message
            logging.getLogger(__name__).warning("CUDA graph capture failed; steps run eagerly, slower: %s", cause)
            return None


def _sizes(batch: Batch) -> tuple[object, ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value


def _copy(batch: Batch) -> Batch:
    copies = iter([tensor.clone() for tensor in _tensors(batch)])
    x = tuple(next(copies) for _ in batch.x)
    return Batch(x, *copies)
