"""A training step: both phases on the same batch, random rows, every loss logged.

python -m tools.bench step
python -m tools.bench step --shapes intersim --batches 32 --precisions fp32 bf16 --turns 30
python -m tools.bench step --device cuda --json
"""

import argparse
from collections.abc import Iterator
from functools import partial

from tools.bench import options, ours
from tools.bench.baseline import Baseline
from tools.bench.measure import Row, Work, interleaved, repeated, side_by_side
from tools.bench.shapes import Setting


def add_options(parser: argparse.ArgumentParser) -> None:
    """Shapes and how they are measured."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=21)


def rows(asked: argparse.Namespace) -> Iterator[Row]:
    """A row for every setting."""
    for setting in options.settings(asked):
        yield side_by_side(setting, interleaved(sides(setting), turns=asked.turns, device=setting.device))


def sides(setting: Setting) -> dict[str, Work]:
    """Steps of the baseline and of ours on the same batch."""
    batch = ours.random_batch(setting)
    system, training = Baseline(setting), ours.Training(setting)
    return {
        "baseline": repeated(partial(system.learn, ours.plain_batch(batch))),
        "ours": repeated(partial(training.learn, batch)),
    }
