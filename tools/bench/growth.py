"""Time of a step as one size grows, and the exponent b of time ~ size^b.

Starts from three modalities of 256 features, 64 latent dimensions and 64 rows and varies one size: batch rows, latent
dimensions, modalities, features, replicates of a stack, or ranks. b is fitted by least squares on logarithms: 0 is
constant, 1 proportional. Stacks and ranks are measured for modis_dist only. Ranks are gloo processes with one thread
each; they run on the CPU only and share the cores of this machine.

    python -m tools.bench growth
    python -m tools.bench growth --vary batch replicates --turns 31
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from modis_dist.train import cpu_settings
from tools.bench import options, pack, ranks
from tools.bench.measure import Measured, Row, Watch, Work, disturbance, exponent, interleaved
from tools.bench.shapes import Setting, of_size
from tools.bench.step import SIDES

BATCH = 64
BASE = {"modalities": 3, "features": 256, "latent": 64}
SIZES: Mapping[str, Sequence[int]] = {
    "batch": (16, 32, 64, 128, 256, 512),
    "latent": (16, 32, 64, 128, 256, 512),
    "modalities": (2, 3, 4, 6, 8),
    "features": (64, 128, 256, 512, 1024),
    "replicates": (1, 2, 4, 8),
    "ranks": (1, 2),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: sizes to vary, and the measurement."""
    parser.add_argument(
        "--vary", nargs="+", choices=SIZES, default=list(SIZES), help="sizes to vary, one at a time (default all)"
    )
    options.of_measurement(parser, turns=15)


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every size of every table."""
    for precision in arguments.precisions:
        for threads in arguments.threads:
            cpu_settings.use(threads)
            start = Setting(name(BASE), of_size(**BASE), BATCH, precision, threads, arguments.device, arguments.loss)
            for varied in arguments.vary:
                yield from table(varied, start, turns=arguments.turns)


def name(sizes: Mapping[str, int]) -> str:
    """Return a short name of a system of equal modalities."""
    return f"{sizes['modalities']}x{sizes['features']}/{sizes['latent']}"


def table(varied: str, start: Setting, *, turns: int) -> list[Row]:
    """Return the rows of all values of one size, measured interleaved."""
    if varied == "ranks":
        return _of_ranks(start, turns=turns)
    settings = {size: resized(start, varied, size) for size in SIZES[varied]}
    works: dict[str, Work] = {}
    for size, setting in settings.items():
        made = {"ours": pack.stack(setting, replicates=size)} if varied == "replicates" else _sides(setting)
        works |= {f"{side} {size}": work for side, work in made.items()}
    return lines(varied, settings, interleaved(works, turns=turns, device=start.device))


def _sides(setting: Setting) -> dict[str, Work]:
    """Return both sides in this process: there are too many sizes for one process each."""
    return {name: make(setting) for name, make in SIDES.items()}


def resized(start: Setting, varied: str, size: int) -> Setting:
    """Return the setting with another value of one size."""
    if varied == "batch":
        return replace(start, batch=size)
    if varied not in BASE:
        return start
    sizes = {**BASE, varied: size}
    return replace(start, name=name(sizes), case=of_size(**sizes))


def _of_ranks(start: Setting, *, turns: int) -> list[Row]:
    """Return the rows of the same batch on one rank and on several."""
    if start.device.type != "cpu":
        return []
    settings = dict.fromkeys(SIZES["ranks"], replace(start, threads=1))
    watch = Watch()
    with ExitStack() as alive:
        works = {f"ours {size}": alive.enter_context(ranks.stepping(start, size=size)) for size in settings}
        times = interleaved(works, turns=turns, device=start.device)
    # The CPU time of the ranks is known only after they have ended.
    return lines("ranks", settings, replace(times, others=watch.others()))


def lines(varied: str, settings: Mapping[int, Setting], times: Measured) -> list[Row]:
    """Return a row for each size, with the exponents of the table."""
    ours = _medians("ours", settings, times)
    baseline = _medians("baseline", settings, times)
    slopes = {"exponent": exponent(ours), "baseline_exponent": exponent(baseline) if baseline else None}
    noise = disturbance(times)
    return [
        {
            **setting.columns(),
            "varied": varied,
            "size": size,
            "baseline_ms": baseline.get(size),
            "ours_ms": ours[size],
            "ratio": baseline[size] / ours[size] if baseline else None,
            **slopes,
            **noise,
        }
        for size, setting in settings.items()
    ]


def _medians(side: str, sizes: Mapping[int, Any], times: Measured) -> dict[int, float]:
    return {size: times.median_ms(f"{side} {size}") for size in sizes if f"{side} {size}" in times.ms}
