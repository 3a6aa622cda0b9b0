"""Tables on standard output, with complete cells at any width."""

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 10_000
PADDING = 3  # of a column: a space on each side and a border


def stdout() -> Console:
    """Return a console as wide as the terminal; output to a file or a pipe is not wrapped."""
    console = _Output(highlight=False)
    return console if console.is_terminal else _Output(highlight=False, width=WIDEST)


class _Output(Console):
    """Stops printing after a broken pipe (``| head``) instead of exiting with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(titled: Iterable[tuple[str, Table]], console: Console) -> None:
    """Print tables with their titles; a table too wide for the terminal keeps complete numbers."""
    for title, table in titled:
        table.title = Text(title) if title else None
        narrowest = sum((column.min_width or 1) + PADDING for column in table.columns) + 1
        if narrowest > console.width:
            table.width = narrowest
        console.print(table, crop=False)
