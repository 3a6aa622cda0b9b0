"""The `modis-dist` command and what every command shares: options, exit codes, one line per mistake."""

import os
import sys
from collections.abc import Sequence

import click
import typer

from modis_dist.cli import config, data, predict, train, tune, ui
from modis_dist.errors import ModisError, shown
from modis_dist.files import PRIVATE_UMASK
from modis_dist.version import __version__

BUG, INTERRUPTED, USAGE = 70, 75, 2

HELP = """Multi-omics integration for small, unpaired, half-labelled data.

First steps: `modis-dist tune tune_spaces/quickstart.yaml`, then `modis-dist ui` on its output folder. With your own
data: `modis-dist data import`, then a study with `data.store`. Every key of a study is explained by
`modis-dist config --explain KEY`.

Exit codes: 0 done, 2 a mistake you can mend (nothing was changed), 3 the training failed, 4 some trials of a sweep
failed, 75 interrupted and saved, 70 a bug.
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
app.add_typer(data.app, name="data")
app.command("tune")(tune.tune)
app.command("train")(train.train)
app.command("evaluate")(train.evaluate)
app.command("predict")(predict.predict)
app.command("embed")(predict.embed)
app.command("translate")(predict.translate)
app.command("model")(config.model)
app.command("config")(config.config)
app.command("ui")(ui.ui)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(given))


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code. Outputs are private to their owner."""
    os.umask(PRIVATE_UMASK)
    try:
        code = app(list(arguments), standalone_mode=False, prog_name="modis-dist")
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _explain(error)
    except KeyboardInterrupt:
        return _say("interrupted; what was saved is kept, the same command continues", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    """One line for whoever has to mend it, and the exit code."""
    if isinstance(error, ModisError):
        return _say(str(error), error.exit_code)
    if isinstance(error, click.exceptions.Abort):
        return _say("interrupted", INTERRUPTED)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        return _say(error.format_message().replace("\n", " "), USAGE)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        return 0
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{shown(where)}{error.strerror or error}", USAGE)
    return _say(f"a bug of ours: {type(error).__name__}: {shown(str(error))}; --debug shows where", BUG)


def _say(message: str, code: int) -> int:
    line = " ".join(message.split("\n"))
    typer.echo(f"error: {line}" if code != INTERRUPTED else line, err=True)
    return code
