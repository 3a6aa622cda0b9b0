"""Whether more or fewer trials in a pack would pay: time, by the probe, and memory, by count, in packs of other sizes.

A study is laid out by count, so that it comes out alike whenever it is started; what is found here is for its user, who
may set `sweep.packing.max_trials` by it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from modis_dist.execution import memory
from modis_dist.execution.memory import Footprint, model_bytes
from modis_dist.execution.run_pack import Pack
from modis_dist.execution.trial import Trial
from modis_dist.planning.estimate import PROBE_BYTES, Cost, sizes_of, wall_seconds
from modis_dist.study.manifest import unique
from modis_dist.study.packs import arrange
from modis_dist.study.plan import Plan
from modis_dist.train.placement import memory_limit

SIZES = (1, 2, 4, 8, 16, 32, 64)
ABOUT = 0.95  # of the least time: the smallest size that takes about that is as good
WORTH = 0.8  # of the time: a smaller gain is not told from noise

Row = dict[str, Any]


def compared(planned: Plan, cost: Callable[[list[Pack]], list[Cost]], *, slots: int, limit: int | None) -> list[Row]:
    """For each size of packs: how many packs, the time of all trials of the search, and the memory of the largest.

    Empty where there is nothing to choose, or the probe would see only a part of a pack. Other sizes that find no room
    are left out. ``cost``: what packs cost. ``limit``: bytes of memory of a pack's node; None where the slots share
    that of this machine.
    """
    layouts, now = _layouts(planned, slots=slots), _planned(planned)
    if len(layouts) <= 1:
        return []
    found = []
    for most, packs in layouts.items():
        held = footprints(planned, packs, limit=limit)
        takes = Footprint(max(one.host for one in held), max(one.gpu for one in held))
        if most == now or _has_room(takes, planned, slots=slots, limit=limit):
            found.append(
                {
                    "max_trials": most,
                    "packs": len(packs),
                    "seconds": wall_seconds(cost(packs), slots=slots),
                    "memory": takes.host,
                    "gpu_memory": takes.gpu,
                    "planned": most == now,
                }
            )
    return found


def better(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """The planned size and one that takes clearly less time, the smallest of those that take about the least."""
    (now,) = (row for row in rows if row["planned"])
    least = min(row["seconds"] for row in rows)
    best = next(row for row in rows if ABOUT * row["seconds"] <= least)
    return (now, best) if best["seconds"] < WORTH * now["seconds"] else None


def footprints(planned: Plan, packs: Sequence[Pack], *, limit: int | None) -> list[Footprint]:
    """What each pack takes, counted from its sizes."""
    count = memory.on_gpu if planned.on_gpu else memory.on_processor
    shapes = [held.shape for held in sizes_of(planned, packs)]
    return [count(pack, planned.store, shape, limit=limit) for pack, shape in zip(packs, shapes, strict=True)]


def _layouts(planned: Plan, *, slots: int) -> dict[int, list[Pack]]:
    """The packs of the search by the most trials that one may have; of sizes that come to the same, the planned one."""
    trials, now = unique(planned.manifest.trials), _planned(planned)
    probed = min(PROBE_BYTES // model_bytes(shape, replicates=1) for shape in planned.shapes.values())
    if now > probed:
        return {}
    found: dict[int, list[Pack]] = {}
    for most in [now, *(size for size in SIZES if size != now and size <= min(probed, 2 * len(trials)))]:
        each = planned.most if most == now else partial(_always, most)
        packs = arrange(trials, planned.selection_of, most=each, slots=slots)
        as_packs = [Pack(pack, probe=planned.study.sweep.probe) for pack in packs]
        if as_packs not in found.values():
            found[most] = as_packs
    return dict(sorted(found.items()))


def _always(most: int, _: Trial) -> int:
    return most


def _planned(planned: Plan) -> int:
    """How many trials may be in one pack as it is; conditions with other networks may have others."""
    return max(planned.most(trial) for trial in planned.manifest.trials)


def _has_room(takes: Footprint, planned: Plan, *, slots: int, limit: int | None) -> bool:
    share = min(1.0, planned.study.sweep.resources.gpus or 1.0)
    gpu = share * torch.cuda.mem_get_info()[1] if takes.gpu and torch.cuda.is_available() else takes.gpu
    return takes.gpu <= gpu and takes.host <= (memory.SHARE * memory_limit() / slots if limit is None else limit)
