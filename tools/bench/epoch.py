"""Time of an epoch including data loading (DataLoaders compared with our loader), noise and loss log.

Uses all training rows of each data set (table S1; 80 % of InterSIM's 11,500); --rows uses fewer, because an epoch of
TCGA takes minutes on a CPU. Our data are on the device, as in `train`; the baseline's are in host memory. Validation
and checkpoints are not included.

    python -m tools.bench epoch --shapes intersim
    python -m tools.bench epoch --shapes tcga10 --rows 512
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from modis_dist.train import cpu_settings
from tools.bench import baseline, options, ours
from tools.bench.measure import Row, Work, interleaved, repeated, side_by_side
from tools.bench.shapes import Setting
from tools.bench.subprocesses import in_subprocesses


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: shapes, measurement and number of rows."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=5)
    parser.add_argument("--rows", type=options.positive, help="maximum rows per modality (default all of the data set)")


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of an epoch and its steps, for every setting with at least one full batch."""
    for setting in options.settings(arguments):
        steps = min(
            setting.case.rows.values() if arguments.rows is None else (*setting.case.rows.values(), arguments.rows)
        )
        steps //= setting.batch
        if not steps:
            continue
        sides = {"baseline": theirs, "ours": our}
        with in_subprocesses(sides, (setting, arguments.rows), device=setting.device) as works:
            times = interleaved(works, turns=arguments.turns, device=setting.device)
        yield side_by_side(setting, times) | {"steps": steps}


def theirs(arguments: tuple[Setting, int | None]) -> Work:
    """Return epochs of the baseline as work."""
    setting, limit = arguments
    torch.set_num_threads(setting.threads)
    data = ours.random_rows(setting.case, limit=limit)
    loaders = baseline.loaders(data.values(), batch=setting.batch)
    return repeated(partial(baseline.train_epoch, baseline.Baseline(setting), loaders))


def our(arguments: tuple[Setting, int | None]) -> Work:
    """Return our epochs on the same rows as work."""
    setting, limit = arguments
    cpu_settings.use(setting.threads)
    loader = ours.loader(setting, ours.random_rows(setting.case, limit=limit))
    return repeated(partial(ours.train_epoch, ours.Training(setting), loader))
