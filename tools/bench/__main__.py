"""Benchmarks of modis_dist against a plain implementation of the published method, both measured in the same run.

Baseline and ours are interleaved in alternating order, so that clock changes and other load affect both; times are
medians over the turns. `ratio` is the baseline's time divided by ours: above 1, ours is faster. `ratio_low` and
`ratio_high` are the quartiles of the ratio per turn. `others` is the number of cores that other processes used; measure
a row with `quiet` NO again. Compare ratios, not milliseconds of two runs.

To add a benchmark, write a module with a docstring, `add_options(parser)` and `rows(arguments)`, which yields one
dictionary per row, and add it to COMMANDS.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Protocol

import torch

from modis_dist.runtime import version
from modis_dist.runtime.fingerprint import machine
from tools.bench import data, epoch, growth, pack, profiled, quality, roofline, show, step, sweep
from tools.bench.measure import Row


class Command(Protocol):
    """One measurement."""

    __doc__: str | None

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""

    def rows(self, arguments: argparse.Namespace) -> Iterator[Row]:
        """Yield the rows of the measurement."""


COMMANDS: dict[str, Command] = {
    "step": step,
    "epoch": epoch,
    "pack": pack,
    "roofline": roofline,
    "profile": profiled,
    "growth": growth,
    "import": data,
    "sweep": sweep,
    "quality": quality,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one subcommand per measurement."""
    main_parser = argparse.ArgumentParser(
        "python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").strip()
        subparser = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        subparser.add_argument("--json", action="store_true", help="print a list of rows as JSON")
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement and print its rows."""
    arguments = parser().parse_args(argv)
    rows: list[Row] = []
    for row in COMMANDS[arguments.command].rows(arguments):
        rows.append(row)
        print(", ".join(f"{key} {show.cell(value)}" for key, value in row.items()), file=sys.stderr, flush=True)
    if not rows:
        raise SystemExit("nothing to measure: --rows is smaller than the batch size; raise --rows or lower --batches")
    if arguments.json:
        print(show.as_json(rows))
    else:
        where = f"{model(arguments)}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}, code {version.code()}"
        print(f"{arguments.command}: {where}\n\n{show.as_table(rows)}")
    return 0


def model(arguments: argparse.Namespace) -> str:
    """Return the model of the CPU or GPU."""
    return str(machine(getattr(arguments, "device", torch.device("cpu")), ranks=1)["model"])


if __name__ == "__main__":
    sys.exit(main())
