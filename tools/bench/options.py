"""Options shared by the measurements, and the settings that they select."""

import argparse
import os
from collections.abc import Iterator
from itertools import product
from typing import get_args

import torch

from modis_dist.train import cpu_settings
from tools.bench.shapes import CASES, Loss, Precision, Setting

CORES = len(os.sched_getaffinity(0))


def of_shapes(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose systems; every combination is a row."""
    parser.add_argument(
        "--shapes", nargs="+", choices=CASES, default=["intersim", "tcga10", "tiny"], help="systems to measure"
    )
    parser.add_argument("--batches", nargs="+", type=at_least_2, default=[32, 512], help="rows of each modality")


def of_measurement(parser: argparse.ArgumentParser, *, turns: int) -> None:
    """Add the options of the measurement."""
    of_settings(parser)
    parser.add_argument(
        "--turns", type=positive, default=turns, help=f"turns of each side; the median is reported (default {turns})"
    )


def of_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options of the training; every combination is a row."""
    parser.add_argument(
        "--precisions", nargs="+", choices=get_args(Precision), default=["fp32"], help="precisions of the networks"
    )
    parser.add_argument("--threads", nargs="+", type=positive, default=[CORES], help="CPU threads (default all)")
    parser.add_argument("--loss", choices=get_args(Loss), default="published", help="adversarial loss")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Yield every requested combination; sets the number of threads for each."""
    for name, batch, precision, threads in product(
        arguments.shapes, arguments.batches, arguments.precisions, arguments.threads
    ):
        cpu_settings.use(threads)
        yield Setting(name, CASES[name], batch, precision, threads, arguments.device, arguments.loss)


def positive(text: str) -> int:
    """Parse a whole number of 1 or more."""
    return _whole(text, least=1)


def at_least_2(text: str) -> int:
    """Parse a whole number of 2 or more: normalisation needs two rows."""
    return _whole(text, least=2)


def _whole(text: str, *, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value
