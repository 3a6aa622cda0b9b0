"""A learner's step on a GPU as one graph: recorded once, replayed from then on without Python.

A small step is hundreds of kernels of a few microseconds, which a processor cannot start as fast as a GPU ends them.
Recorded, the whole of a step, its optimiser included, is started at once. What is recorded always reads and writes the
same memory, so a batch is copied there first, once for both learners, and the terms that come back hold until the next
step.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from typing import ClassVar, NamedTuple, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights

Step = Callable[[Batch, Weights, Rules], Terms]

WARM_UP = 3  # steps before recording, in which libraries allocate what they need once
MEANT_FOR_RECORDING = "This instance was constructed with capturable=True"  # of an optimiser, in steps before that


class Recorder(Protocol):
    """How a step is run before it is recorded, and recorded."""

    refused: bool  # a step could not be recorded: no other is tried

    def aside(self, step: Callable[[], Terms]) -> Terms:
        """Run it where it will be recorded."""
        ...

    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        """What runs it again, and the terms that this writes; recording does not run it."""
        ...


class GraphRecorder:
    """CUDA graphs, on a stream of their own."""

    _without_end: ClassVar[list[torch.cuda.CUDAGraph]] = []  # never dropped: the allocator goes on asking them

    def __init__(self, device: torch.device) -> None:
        self.refused = False
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def aside(self, step: Callable[[], Terms]) -> Terms:
        """See ``Recorder.aside``."""
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", MEANT_FOR_RECORDING)
            terms = step()
        around.wait_stream(self._stream)
        return terms

    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:
        """See ``Recorder.record``."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream around is set once more, for where recording fails `graph` does not leave its own.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
                terms = step()
        except RuntimeError:
            if not _has_ended(graph):
                self._without_end.append(graph)
            raise
        return graph.replay, terms


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether its recording was closed, as it is where memory is out: dropped then, it gives its memory back."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@cache
def recorder_on(device: torch.device) -> Recorder | None:
    """What records steps on a device, or None where they are not recorded.

    One for all trainings of a process: for every stream, libraries and the allocator hold memory of their own for ever.
    """
    return GraphRecorder(device) if device.type == "cuda" else None


class Inputs:
    """Where recorded steps find their batch: one place for both sides of the game, filled once for a batch."""

    def __init__(self) -> None:
        self._given: ReferenceType[Batch] | None = None
        self._held: Batch | None = None

    def filled(self, batch: Batch) -> Batch:
        """The place with the batch in it; another one than before where sizes are others."""
        if self._held is not None and self._given is not None and self._given() is batch:
            return self._held
        if self._held is None or _sizes(self._held) != _sizes(batch):
            self._held = _copy(batch)
        else:
            for kept, given in zip(_tensors(self._held), _tensors(batch), strict=True):
                kept.copy_(given, non_blocking=True)
        self._given = ref(batch)
        return self._held


class _Recorded(NamedTuple):
    """A step that reads ``held`` and writes ``terms``."""

    held: Batch
    replay: Callable[[], object]
    terms: Terms


class Captured:
    """Steps that are recorded after a few, and anew where sizes, weights or rules are others.

    Holds nothing of who takes the steps, whose memory is then free as soon as it is dropped.
    """

    def __init__(self, recorder: Recorder, inputs: Inputs) -> None:
        self._recorder = recorder
        self._inputs = inputs
        self.forget()

    def forget(self) -> None:
        """Record anew, after a few steps more: what was recorded writes to memory that is no longer the learner's."""
        self._weights: Weights | None = None
        self._of: tuple[object, ...] = ()
        self._warm = 0
        self._recorded: _Recorded | None = None

    def __call__(self, step: Step, batch: Batch, weights: Weights, rules: Rules) -> Terms:
        """The step on a batch; the terms hold until the next call. Raises what a step raises.

        Where a step cannot be recorded a warning says so, and steps are taken one by one.
        """
        of = (rules, _sizes(batch))
        if self._weights is not weights or of != self._of:
            self.forget()
            self._weights, self._of = weights, of
        if self._recorded is not None or (self._warm == WARM_UP and not self._recorder.refused):
            held = self._inputs.filled(batch)
            if self._recorded is None or self._recorded.held is not held:
                self._recorded = None  # gives its memory to the next
                self._recorded = self._record(step, held, weights, rules)
        if self._recorded is None:
            self._warm = min(self._warm + 1, WARM_UP)
            return self._recorder.aside(lambda: step(batch, weights, rules))
        self._recorded.replay()
        return self._recorded.terms

    def _record(self, step: Step, held: Batch, weights: Weights, rules: Rules) -> _Recorded | None:
        if self._recorder.refused:
            return None
        try:
            return _Recorded(held, *self._recorder.record(lambda: step(held, weights, rules)))
        except RuntimeError as error:
            self._recorder.refused = True
            cause = error.__context__ or error  # the end of a recording that failed fails too, and says less
            logging.getLogger(__name__).warning("a step cannot be recorded, which is slower: %s", cause)
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
    copied: dict[str, object] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        copied[field.name] = tuple(x.clone() for x in value) if isinstance(value, tuple) else value
        if isinstance(value, Tensor):
            copied[field.name] = value.clone()
    return Batch(**copied)  # type: ignore[arg-type]
