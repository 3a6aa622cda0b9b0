"""Stacks of replicates: how many replicate steps a second R = 1, 2, 4 and 8 take, against one alone. Ours only.

Times are of one replicate's step: `baseline_ms` alone, `ours_ms` as one of R in a stack; the ratio is how many times as
many replicates a stack trains in the same time. R = 1 is measured against itself, which shows the noise.

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
    """Shapes, how they are measured, and the sizes of stacks."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=15)
    parser.add_argument("--replicates", nargs="+", type=options.positive, default=[1, 2, 4, 8], help="in a stack")


def rows(asked: argparse.Namespace) -> Iterator[Row]:
    """A row for every setting and size."""
    for setting in options.settings(asked):
        for replicates in asked.replicates:
            works = {"baseline": stack(setting, replicates=1), "ours": stack(setting, replicates=replicates)}
            found = interleaved(works, turns=asked.turns, device=setting.device)
            row = side_by_side(setting, of_one(found, replicates=replicates))
            yield row | {"replicates": replicates, "replicate_steps_per_s": 1000 / row["ours_ms"]}


def stack(setting: Setting, *, replicates: int) -> Work:
    """Steps of a stack."""
    training = ours.Training(setting, replicates=replicates)
    return repeated(partial(training.learn, ours.random_batch(setting, replicates=replicates)))


def of_one(found: Measured, *, replicates: int) -> Measured:
    """The same with a stack's time shared out among its replicates."""
    shared = tuple(ms / replicates for ms in found.ms["ours"])
    return Measured({**found.ms, "ours": shared}, found.others)
