"""The ranks that train one stack together, and what they tell each other.

The global batch is the unit: of every modality each rank takes a block of its rows, and whatever couples rows (latent
losses, statistics of normalisation) is computed from all blocks, so that any number of ranks takes the same step. A
rank alone is the ordinary case and the same code.

Every rank differentiates a loss in which the rows of other ranks stand still. Together they differentiate the whole:
the gradients of the parameters are the sums over ranks.

Legend: r replicates, m modalities, b rows of the global batch, n rows of all modalities on one rank, w widths.
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
    """Who of several ranks is there."""

    def says(self, word: str) -> None:
        """Tell the others that this rank has come to a point; each word is said once."""
        ...

    def wait_for(self, rank: int, word: str) -> None:
        """Until a rank has said a word, for as long as it runs; raises where it is lost."""
        ...


@dataclass(frozen=True)
class World:
    """One rank among ``size``; with several, a process group must be there and every rank makes the same calls."""

    rank: int = 0
    size: int = 1
    host: Any = None  # process group for what is on the host
    roll: Presence | None = None
    count: Iterator[int] = field(default_factory=itertools.count, compare=False)  # of what was awaited

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to: no process group, and this is the only rank."""
        return self.host is None

    def block(self, modality: int, rows: int, *, rank: int | None = None) -> slice:
        """Rows of a global batch of a modality (by position) that a rank has; some may have none.

        Sizes differ by one row at most. Which ranks have one more changes from modality to modality.
        """
        place = ((self.rank if rank is None else rank) + modality) % self.size
        return slice(place * rows // self.size, (place + 1) * rows // self.size)

    def own(self, whole: Shaped[Tensor, "r m b *w"]) -> Shaped[Tensor, "r n *w"]:
        """This rank's rows, one modality after the other."""
        if self.alone:
            return whole.flatten(1, 2)
        modalities, rows = whole.shape[1:3]
        return torch.cat([whole[:, m, self.block(m, rows)] for m in range(modalities)], 1)

    def whole(self, own: Sequence[Shaped[Tensor, "r n _"]], modalities: int, rows: int) -> tuple[Tensor, ...]:
        """The inverse of ``own`` for several tensors at once, each [r, m, b, w]; gradients reach this rank's rows."""
        if self.alone:
            return tuple(part.view(len(part), modalities, rows, -1) for part in own)
        joined = torch.cat(list(own), -1)
        counts, index = _layout(self, modalities, rows, joined.device)
        padded = F.pad(joined, (0, 0, 0, max(counts) - counts[self.rank]))
        ranks = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(ranks, padded.detach().contiguous())
        ranks[self.rank] = padded
        found = torch.cat(ranks, 1).index_select(1, index).view(len(joined), modalities, rows, -1)
        return torch.split(found, [part.shape[-1] for part in own], -1)

    def sum(self, share: Tensor) -> Tensor:
        """Sum over ranks, equal to the bit on all of them; differentiable."""
        if self.alone:
            return share
        summed: Tensor = _Sum.apply(share)  # type: ignore[no-untyped-call]
        return summed

    def agreed(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank; what it raises there is raised on every rank.

        It must take seconds only, or the others take rank 0 for lost.
        """
        if self.alone:
            return make()
        agreed: T = self._told(_tried(make) if self.rank == 0 else [None, None])
        return agreed

    def awaited(self, make: Callable[[], T]) -> T:
        """As ``agreed``, where ``make`` may take minutes: the others wait for as long as rank 0 runs."""
        if self.alone:
            return make()
        assert self.roll is not None
        word, told = f"awaited {next(self.count)}", [None, None]
        if self.rank == 0:
            told = _tried(make)
            self.roll.says(word)
        else:
            self.roll.wait_for(0, word)
        awaited: T = self._told(told)
        return awaited

    def first(self, make: Callable[[], T]) -> T | None:
        """What ``make`` returns on rank 0; None on the others, which wait. What it raises is raised on every rank."""
        made: list[T] = []
        self.awaited(lambda: made.append(make()))
        return made[0] if made else None

    def _told(self, told: list[Any]) -> Any:
        dist.broadcast_object_list(told, src=0, group=self.host)
        if told[1] is not None:
            raise told[1]
        return told[0]


def _tried(make: Callable[[], Any]) -> list[Any]:
    """What it returns, or what it raises."""
    try:
        return [make(), None]
    except Exception as error:
        return [None, error]


ALONE = World()


class _Sum(torch.autograd.Function):
    """All-reduce, whose gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(_: Any, share: Tensor) -> Tensor:
        summed = share.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient)


@lru_cache(maxsize=64)
def _layout(world: World, modalities: int, rows: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Rows of every rank; and where each row of the global batch is among those of all ranks, padded to one length."""
    blocks = [[world.block(m, rows, rank=rank) for m in range(modalities)] for rank in range(world.size)]
    counts = [sum(block.stop - block.start for block in held) for held in blocks]
    place = torch.empty(modalities, rows, dtype=torch.long)
    for rank, held in enumerate(blocks):
        start = rank * max(counts)
        for modality, block in enumerate(held):
            length = block.stop - block.start
            place[modality, block] = torch.arange(start, start + length)
            start += length
    return counts, place.flatten().to(device)
