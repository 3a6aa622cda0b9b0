"""Interleaved timing of several pieces of work, so that other load affects all alike, and detection of other load.

Independent of the work that is measured.
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

Work = Callable[[int], object]  # called with the number of repeats
Row = dict[str, Any]

TURN_S = 0.2  # of work in a turn; at least one repeat
WARM_UP_CALLS = WARM_UP + 2  # on a GPU a step is captured in between
QUIET = 0.05  # share of the cores that other processes may use
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Measured:
    """Milliseconds per repeat of each work in every turn, and the cores that other processes used."""

    ms: Mapping[str, tuple[float, ...]]
    others: float | None  # None if the system does not report it

    def median_ms(self, name: str) -> float:
        """Return the median time of a repeat."""
        return median(self.ms[name])

    def ratio(self, over: str, under: str) -> float:
        """Return the ratio of the medians."""
        return self.median_ms(over) / self.median_ms(under)

    def spread(self, over: str, under: str) -> tuple[float, float]:
        """Return the first and third quartile of the ratio per turn."""
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
    """Average number of cores that other processes, and other guests of the host, use since construction.

    Busy time of the cores that this process may run on, minus the CPU time of this process and its children.
    """

    def __init__(self) -> None:
        self._before = cpu_times()

    def others(self) -> float | None:
        """Return the number of cores; None if the system's counters do not advance."""
        passed_s, busy_s, own_s = (now - before for now, before in zip(cpu_times(), self._before, strict=True))
        if busy_s <= 0.5 * own_s:
            return None
        return max(0.0, busy_s - own_s) / passed_s


def cpu_times() -> tuple[float, float, float]:
    """Return wall time, busy time of the cores, and CPU time of this process and its children, in seconds."""
    every = psutil.cpu_times(percpu=True)
    cores = [every[core] for core in os.sched_getaffinity(0) if core < len(every)]
    busy = sum(getattr(core, kind, 0.0) for core in cores for kind in BUSY)
    ended = os.times()
    living = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    children = ended.children_user + ended.children_system + sum(times.user + times.system for times in living)
    return time.perf_counter(), busy, time.process_time() + children


def repeated(step: Callable[[], object]) -> Work:
    """Return a step as work."""

    def work(times: int) -> None:
        for _ in range(times):
            step()

    return work


def interleaved(works: Mapping[str, Work], *, turns: int, device: torch.device, turn_s: float = TURN_S) -> Measured:
    """Time every work in every turn, in alternating order, after a warm-up."""
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
    """Return the time of a number of repeats, from an idle device to an idle device."""
    began = _finished(device)
    work(times)
    return _finished(device) - began


def _finished(device: torch.device) -> float:
    """Return the time once all work queued on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def side_by_side(setting: Setting, times: Measured) -> Row:
    """Return a row that compares works named ``baseline`` and ``ours``; a ratio above 1 means that ours is faster."""
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
    """Return the columns on other load of the machine."""
    if times.quiet is False:
        print(f"other processes used {times.others:.2f} cores: measure again on an idle machine", file=sys.stderr)
    return {"others": times.others, "quiet": times.quiet}


def exponent(times: Mapping[int, float]) -> float:
    """Return b of time = a * size^b, by least squares on logarithms; ``times`` has the time of each size."""
    return linear_regression([log(size) for size in times], [log(ms) for ms in times.values()]).slope
