"""An epoch with its data: DataLoaders over single rows against our loader, noise and loss log included.

The rows are as many as each data set trains on (table S1; 80 % of InterSIM's 11,500); --rows takes fewer, for an epoch
of TCGA takes minutes on a processor. Our data are on the device from the start, as in `train`; the baseline's are in
the memory of the host. What happens between epochs (validation, checkpoints) is in neither.

    python -m tools.bench epoch --shapes intersim
    python -m tools.bench epoch --shapes tcga10 --rows 512
"""

import argparse
from collections.abc import Iterator
from functools import partial

from tools.bench import baseline, options, ours
from tools.bench.measure import Row, interleaved, repeated, side_by_side


def add_options(parser: argparse.ArgumentParser) -> None:
    """Shapes, how they are measured, and how many rows."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=5)
    parser.add_argument("--rows", type=options.positive, help="rows of each modality at most; all of the data set's")


def rows(asked: argparse.Namespace) -> Iterator[Row]:
    """A row for every setting whose batches the data fill; milliseconds of an epoch and its steps."""
    for setting in options.settings(asked):
        data = ours.random_rows(setting.case, limit=asked.rows)
        steps = min(len(label) for _, label in data.values()) // setting.batch
        if not steps:
            continue
        system, training = baseline.Baseline(setting), ours.Training(setting)
        works = {
            "baseline": repeated(
                partial(baseline.train_epoch, system, baseline.loaders(data.values(), batch=setting.batch))
            ),
            "ours": repeated(partial(ours.train_epoch, training, ours.loader(setting, data))),
        }
        found = interleaved(works, turns=asked.turns, device=setting.device)
        yield side_by_side(setting, found) | {"steps": steps}
