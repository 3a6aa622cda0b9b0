"""The ranks that train one stack together, and their collectives.

Each rank processes a block of the global batch, with rows of every modality. Whatever couples rows (latent losses,
normalisation statistics) is computed over the global batch, so the number of ranks does not change the optimisation.
A single rank runs the same code.

Every rank differentiates its loss with the rows of other ranks as constants; parameter gradients are summed over ranks.

Legend: r slots, m modalities, b rows of the global batch, n rows of all modalities on one rank, w widths.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")


@runtime_checkable
class Presence(Protocol):
    """Announcements between ranks, and detection of lost ranks."""

    def announce(self, word: str) -> None:
        """Tell the other ranks that this rank reached the point ``word``; each word is announced once."""
        ...

    def wait_for(self, rank: int, word: str) -> None:
        """Block until ``rank`` announces ``word``; raises if the rank is lost."""
        ...


@dataclass(frozen=True)
class World:
    """One rank of ``size``. Several ranks need a process group, and each of them must make the same calls."""

    rank: int = 0
    size: int = 1
    host_group: Any = None  # process group for host memory
    presence: Presence | None = None
    counter: Iterator[int] = field(default_factory=itertools.count, compare=False)  # of slow broadcasts

    @property
    def alone(self) -> bool:
        """True if this is the only rank, without a process group."""
        return self.host_group is None

    def block(self, modality: int, rows: int, *, rank: int | None = None) -> slice:
        """Return the rows of a modality's global batch that a rank (default: this one) processes; may be empty.

        Sizes differ by at most one row; which ranks get the larger blocks depends on the modality.
        """
        position = ((self.rank if rank is None else rank) + modality) % self.size
        return slice(position * rows // self.size, (position + 1) * rows // self.size)

    def local(self, batch: Shaped[Tensor, "r m b *w"]) -> Shaped[Tensor, "r n *w"]:
        """Return this rank's rows of a global batch, concatenated over modalities."""
        if self.alone:
            return batch.flatten(1, 2)
        modalities, rows = batch.shape[1:3]
        return torch.cat([batch[:, m, self.block(m, rows)] for m in range(modalities)], 1)

    def gather(self, parts: Sequence[Shaped[Tensor, "r n _"]], modalities: int, rows: int) -> tuple[Tensor, ...]:
        """Return global tensors [r, m, b, w], the inverse of ``local``; gradients flow to this rank's rows only."""
        if self.alone:
            return tuple(part.view(len(part), modalities, rows, -1) for part in parts)
        joined = torch.cat(list(parts), -1)
        counts, index = _layout(self, modalities, rows, joined.device)
        padded = F.pad(joined, (0, 0, 0, max(counts) - counts[self.rank]))
        ranks = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(ranks, padded.detach().contiguous())
        ranks[self.rank] = padded
        batch = torch.cat(ranks, 1).index_select(1, index).view(len(joined), modalities, rows, -1)
        return torch.split(batch, [part.shape[-1] for part in parts], -1)

    def sum(self, local: Tensor) -> Tensor:
        """Return the sum over ranks, bit-identical on every rank; differentiable."""
        if self.alone:
            return local
        total: Tensor = _AllReduce.apply(local)  # type: ignore[no-untyped-call]
        return total

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 and return its result, or raise its error, on every rank.

        ``make`` must return within seconds, or the other ranks report rank 0 as lost.
        """
        if self.alone:
            return make()
        result: T = self._broadcast_result(_attempt(make) if self.rank == 0 else [None, None])
        return result

    def broadcast_when_done(self, make: Callable[[], T]) -> T:
        """``broadcast`` for a ``make`` that may take minutes: the other ranks wait for as long as rank 0 runs."""
        if self.alone:
            return make()
        assert self.presence is not None
        word, outcome = f"broadcast {next(self.counter)}", [None, None]
        if self.rank == 0:
            outcome = _attempt(make)
            self.presence.announce(word)
        else:
            self.presence.wait_for(0, word)
        result: T = self._broadcast_result(outcome)
        return result

    def only_on_rank_0(self, make: Callable[[], T]) -> T | None:
        """Call ``make`` on rank 0 and return its result there, None elsewhere; all ranks wait and raise its error."""
        results: list[T] = []
        self.broadcast_when_done(lambda: results.append(make()))
        return results[0] if results else None

    def _broadcast_result(self, outcome: list[Any]) -> Any:
        dist.broadcast_object_list(outcome, src=0, group=self.host_group)
        result, error = outcome
        if error is not None:
            raise error
        return result


def _attempt(make: Callable[[], Any]) -> list[Any]:
    """Return the result and the error of a call; one of them is None."""
    try:
        return [make(), None]
    except Exception as error:
        return [None, error]


ALONE = World()


class _AllReduce(torch.autograd.Function):
    """All-reduce; its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(_: Any, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _AllReduce.forward(None, gradient)


@lru_cache(maxsize=64)
def _layout(world: World, modalities: int, rows: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Return each rank's row count, and the position of each global row in the ranks' rows, padded to equal length."""
    blocks = [[world.block(m, rows, rank=rank) for m in range(modalities)] for rank in range(world.size)]
    counts = [sum(block.stop - block.start for block in rank_blocks) for rank_blocks in blocks]
    position = torch.empty(modalities, rows, dtype=torch.long)
    for rank, rank_blocks in enumerate(blocks):
        start = rank * max(counts)
        for modality, block in enumerate(rank_blocks):
            length = block.stop - block.start
            position[modality, block] = torch.arange(start, start + length)
            start += length
    return counts, position.flatten().to(device)
