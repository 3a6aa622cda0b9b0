"""The `modis-dist` command and what every command shares: options, exit codes, one line per mistake."""

import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import typer

from modis_dist.cli import (
    config,
    data,
    doctor,
    job,
    mlflow_sync,
    predict,
    status,
    submit,
    train,
    tune,
    ui,
    verify_resume,
)
from modis_dist.runtime.errors import ModisError, shown
from modis_dist.runtime.files import PRIVATE_UMASK
from modis_dist.runtime.version import __version__

BUG, INTERRUPTED, USAGE = 70, 75, 2

HELP = """Multi-omics integration for small, unpaired, half-labelled data.

First steps: `modis-dist tune tune_spaces/quickstart.yaml`, then `modis-dist ui` on its output folder. With your own
data: `modis-dist data import`, then a study with `data.store`. Every key of a study is explained by
`modis-dist config --explain KEY`. On a Slurm cluster: `modis-dist submit`.

Exit codes: 0 done, 2 a mistake you can mend (nothing was changed), 3 the training failed, 4 some trials of a sweep
failed, 75 interrupted and saved, 70 a bug.
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
app.add_typer(data.app, name="data")
app.command("tune")(tune.tune)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("cancel")(submit.cancel)
app.command("resume")(submit.resume)
app.command("fetch")(submit.fetch)
app.command("train")(train.train)
app.command("evaluate")(train.evaluate)
app.command("verify-resume")(verify_resume.verify_resume)
app.command("predict")(predict.predict)
app.command("embed")(predict.embed)
app.command("translate")(predict.translate)
app.command("model")(config.model)
app.command("config")(config.config)
app.command("ui")(ui.ui)
app.command("mlflow-sync")(mlflow_sync.mlflow_sync)
app.command("doctor")(doctor.doctor)
app.add_typer(job.app, name="job", hidden=True)


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
    _open_closed_streams()
    debug = "--debug" in arguments
    try:
        return _invoke([argument for argument in arguments if argument != "--debug"])
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error)
    except KeyboardInterrupt:
        return _say("interrupted; what was saved is kept, the same command continues", INTERRUPTED)


def _open_closed_streams() -> None:
    """A shell may start us without standard output or error (``>&-``): what is said then goes nowhere."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _invoke(arguments: list[str]) -> int:
    """The command itself; everything it raises comes out as it was raised, which ``app(...)`` would not do."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("modis-dist", arguments or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


def _explain(error: Exception) -> int:
    """One line for whoever has to mend it, and the exit code."""
    if isinstance(error, ModisError):
        return _say(str(error), error.exit_code)
    if isinstance(error, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    if isinstance(error, typer.TyperException) and not error.format_message():
        return 0  # a group of commands without a command has printed its help
    if isinstance(error, typer.TyperException):
        return _say(_usage(error), USAGE)
    if isinstance(error, BrokenPipeError) and _reader_left():
        return 0
    if isinstance(error, OSError):
        where = f"{shown(str(error.filename))}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}", USAGE)
    return _say(f"a bug of ours: {type(error).__name__}: {shown(str(error))}; --debug shows where", BUG)


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "modis-dist"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more (`| head`); if so, nothing more is sent there."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file behind it
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    gone = any(events & select.POLLERR for _, events in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _say(message: str, code: int) -> int:
    """Print one line, whatever the message holds."""
    line = "".join(letter if letter.isprintable() else " " if letter.isspace() else shown(letter) for letter in message)
    with suppress(OSError):  # nobody listens any more
        typer.echo(f"error: {line}" if code != INTERRUPTED else line, err=True)
    return code
