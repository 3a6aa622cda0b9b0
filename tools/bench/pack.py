"""Throughput of stacks of R replicates relative to a single replicate (modis_dist only).

Times are per replicate: `baseline_ms` is the step time of a single replicate, `ours_ms` that of a stack divided by R;
`ratio` is the gain in throughput. Batches come from the loader; all replicates share their rows. Stack sizes are
interleaved; R = 1 shows the measurement noise.

    python -m tools.bench pack --shapes intersim tiny
    python -m tools.bench pack --shapes tcga10 --batches 32 --replicates 2 4
"""

import argparse
from collections.abc import Iterator
from functools import partial

from tools.bench import options, ours
from tools.bench.measure import Measured, Row, Work, interleaved, repeated, side_by_side
from tools.bench.shapes import Setting


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: shapes, measurement and stack sizes."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=15)
    parser.add_argument(
        "--replicates", nargs="+", type=options.positive, default=[1, 2, 4, 8, 16], help="replicates in a stack"
    )


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every setting and stack size."""
    for setting in options.settings(arguments):
        stacks = {str(replicates): stack(setting, replicates=replicates) for replicates in arguments.replicates}
        times = interleaved(
            {"alone": stack(setting, replicates=1), **stacks}, turns=arguments.turns, device=setting.device
        )
        for replicates in arguments.replicates:
            row = side_by_side(setting, of_one(times, replicates=replicates))
            yield row | {"replicates": replicates, "replicate_steps_per_s": 1000 / row["ours_ms"]}


def stack(setting: Setting, *, replicates: int) -> Work:
    """Return steps of a stack as work, each with its batch."""
    training = ours.Training(setting, replicates=replicates)
    loader = ours.loader(setting, ours.random_rows(setting.case, limit=None), replicates=replicates)
    return repeated(partial(next, ours.endless_steps(training, loader)))


def of_one(times: Measured, *, replicates: int) -> Measured:
    """Return the times of a single replicate and of one in a stack, whose time is divided by ``replicates``."""
    shared = tuple(ms / replicates for ms in times.ms[str(replicates)])
    return Measured({"baseline": times.ms["alone"], "ours": shared}, times.others)
