"""Times of several pieces of work, taken in turns so that what disturbs one disturbs all, and whether anything did.

Knows nothing of what is measured.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from statistics import linear_regression, median, quantiles
from typing import Any

import psutil
import torch

from modis_dist.train.cuda_graph import WARM_UP
from tools.bench.shapes import Setting

Work = Callable[[int], object]  # do it so many times
Row = dict[str, Any]

TURN_S = 0.2  # of work in a turn, at least one piece
WARM_UP_CALLS = WARM_UP + 2  # on a GPU a step is captured in between
QUIET = 0.05  # share of the cores that others may use
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one piece of each work, in every turn; and the cores that other processes used meanwhile."""

    ms: Mapping[str, tuple[float, ...]]
    others: float | None  # None where this system does not tell

    def median_ms(self, name: str) -> float:
        """Of one piece of work."""
        return median(self.ms[name])

    def ratio(self, over: str, under: str) -> float:
        """Of the medians."""
        return self.median_ms(over) / self.median_ms(under)

    def spread(self, over: str, under: str) -> tuple[float, float]:
        """First and third quartile of the turns' own ratios."""
        ratios = [a / b for a, b in zip(self.ms[over], self.ms[under], strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        first, _, third = quantiles(ratios, n=4, method="inclusive")
        return first, third

    @property
    def quiet(self) -> bool | None:
        """True if other processes used few of the cores; None if unknown."""
        return None if self.others is None else self.others <= QUIET * len(os.sched_getaffinity(0))


class Watch:
    """The cores that other processes (and other machines on the same host) use on average, since it was made.

    Of the cores that this process may run on: their busy time less that of this process and its children.
    """

    def __init__(self) -> None:
        self._before = cpu_times()

    def others(self) -> float | None:
        """In cores; None where the system's counters stand still."""
        passed_s, busy_s, own_s = (now - before for now, before in zip(cpu_times(), self._before, strict=True))
        if busy_s <= 0.5 * own_s:
            return None
        return max(0.0, busy_s - own_s) / passed_s


def cpu_times() -> tuple[float, float, float]:
    """Seconds: the clock, busy time of the cores, CPU time of this process and its children."""
    every = psutil.cpu_times(percpu=True)
    cores = [every[core] for core in os.sched_getaffinity(0) if core < len(every)]
    busy = sum(getattr(core, kind, 0.0) for core in cores for kind in BUSY)
    ended = os.times()
    living = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    children = ended.children_user + ended.children_system + sum(times.user + times.system for times in living)
    return time.perf_counter(), busy, time.process_time() + children


def repeated(step: Callable[[], object]) -> Work:
    """A step as work."""

    def work(times: int) -> None:
        for _ in range(times):
            step()

    return work


def interleaved(works: Mapping[str, Work], *, turns: int, device: torch.device, turn_s: float = TURN_S) -> Measured:
    """Every work in every turn, forwards and backwards alternately, after it has warmed up."""
    times = {name: pieces_per_turn(work, device, turn_s) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    watch = Watch()
    for turn in range(turns):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            seconds[name].append(1e3 * _seconds(works[name], times[name], device) / times[name])
    return Measured({name: tuple(ms) for name, ms in seconds.items()}, watch.others())


def pieces_per_turn(work: Work, device: torch.device, turn_s: float) -> int:
    """Return the number of calls that fill a turn, after a warm-up."""
    took = [_seconds(work, 1, device) for _ in range(WARM_UP_CALLS)]
    return max(1, round(turn_s / took[-1]))


def _seconds(work: Work, times: int, device: torch.device) -> float:
    """From when the device has nothing to do until it has nothing to do again."""
    began = _finished(device)
    work(times)
    return _finished(device) - began


def _finished(device: torch.device) -> float:
    """The time at which all that was arguments of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def side_by_side(setting: Setting, times: Measured) -> Row:
    """A row that compares works named ``baseline`` and ``ours``; a ratio above 1 is time that ours saves."""
    low, high = times.spread("baseline", "ours")
    return {
        **setting.columns(),
        "baseline_ms": times.median_ms("baseline"),
        "ours_ms": times.median_ms("ours"),
        "ratio": times.ratio("baseline", "ours"),
        "ratio_low": low,
        "ratio_high": high,
        **disturbance(times),
    }


def disturbance(times: Measured) -> Row:
    """Columns that say whether the machine was quiet."""
    if times.quiet is False:
        print(f"other processes used {times.others:.2f} cores: measure again on an idle machine", file=sys.stderr)
    return {"others": times.others, "quiet": times.quiet}


def exponent(times: Mapping[int, float]) -> float:
    """b of time = a * size^b, by least squares of the logarithms; ``times`` holds the time of each size."""
    return linear_regression([log(size) for size in times], [log(ms) for ms in times.values()]).slope
