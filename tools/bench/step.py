"""Time of a training step: both phases on one batch of random rows, every loss logged.

python -m tools.bench step
python -m tools.bench step --shapes intersim --batches 32 --precisions fp32 bf16 --turns 30
python -m tools.bench step --device cuda --json
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from modis_dist.train import cpu_settings
from tools.bench import options, ours
from tools.bench.baseline import Baseline
from tools.bench.measure import Row, Work, interleaved, repeated, side_by_side
from tools.bench.shapes import Setting
from tools.bench.subprocesses import in_subprocesses


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: shapes and measurement."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=21)


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every setting."""
    for setting in options.settings(arguments):
        with in_subprocesses(SIDES, setting, device=setting.device) as works:
            yield side_by_side(setting, interleaved(works, turns=arguments.turns, device=setting.device))


def theirs(setting: Setting) -> Work:
    """Return steps of the baseline as work."""
    torch.set_num_threads(setting.threads)
    return repeated(partial(Baseline(setting).learn, ours.plain_batch(ours.random_batch(setting))))


def our(setting: Setting) -> Work:
    """Return our steps on the same batch as work."""
    cpu_settings.use(setting.threads)
    return repeated(partial(ours.Training(setting).learn, ours.random_batch(setting)))


SIDES = {"baseline": theirs, "ours": our}
