"""The `modis-dist` command: common options, exit codes, and errors as one line."""

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
    mlflow,
    predict,
    status,
    submit,
    train,
    tune,
    verify_resume,
)
from modis_dist.runtime.errors import ModisError
from modis_dist.runtime.files import PRIVATE_UMASK
from modis_dist.runtime.text import shown
from modis_dist.runtime.version import __version__

BUG, INTERRUPTED, USAGE = 70, 75, 2

HELP = """Multi-omics integration for small, unpaired, partially labelled data.

Getting started: run `modis-dist tune tune_spaces/quickstart.yaml`, then `modis-dist ui` on its output folder. To use
your own data, run `modis-dist data import` and set `data.store` in a study. `modis-dist config --explain KEY` explains
every key of a study. `modis-dist submit` runs a study on a Slurm cluster.

Exit codes: 0 success, 2 invalid input (nothing was changed), 3 training failed, 4 some trials of a sweep failed,
75 interrupted with the state saved (rerun to resume), 70 internal error.
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
app.command("ui")(mlflow.ui)
app.command("mlflow-sync")(mlflow.mlflow_sync)
app.command("doctor")(doctor.doctor)
app.add_typer(job.app, name="job", hidden=True)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options common to all commands."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. Created files are accessible to their owner only."""
    os.umask(PRIVATE_UMASK)
    _open_closed_streams()
    debug = "--debug" in arguments
    try:
        return _invoke([argument for argument in arguments if argument != "--debug"])
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)
    except KeyboardInterrupt:
        return _print_error("interrupted; rerun the same command to resume", INTERRUPTED)


def _open_closed_streams() -> None:
    """Replace standard output or error by the null device if the shell closed them (``>&-``)."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _invoke(arguments: list[str]) -> int:
    """Invoke the command; exceptions propagate unchanged, unlike with ``app(...)``."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("modis-dist", arguments or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as exit_:
        return exit_.exit_code
    return 0


def _report(error: Exception) -> int:
    """Print an error as one line and return the exit code."""
    if isinstance(error, ModisError):
        return _print_error(str(error), error.exit_code)
    if isinstance(error, typer.Abort):
        return _print_error("interrupted", INTERRUPTED)
    if isinstance(error, typer.TyperException) and not error.format_message():
        return 0  # a group of commands without a command has printed its help
    if isinstance(error, typer.TyperException):
        return _print_error(_usage(error), USAGE)
    if isinstance(error, BrokenPipeError) and _stdout_has_no_reader():
        return 0
    if isinstance(error, OSError):
        location = f"{shown(str(error.filename))}: " if error.filename else ""
        return _print_error(f"{location}{error.strerror or error}", USAGE)
    return _print_error(
        f"internal error: {type(error).__name__}: {shown(str(error))}; rerun with --debug for the traceback", BUG
    )


def _usage(error: typer.TyperException) -> str:
    """Return the message of a usage error with a pointer to the help."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "modis-dist"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def _stdout_has_no_reader() -> bool:
    """Return True if standard output is a pipe without a reader (`| head`), and redirect it to the null device."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def _print_error(message: str, code: int) -> int:
    """Print a message as one line, without control characters, and return ``code``."""
    line = "".join(letter if letter.isprintable() else " " if letter.isspace() else shown(letter) for letter in message)
    with suppress(OSError):  # closed
        typer.echo(f"error: {line}" if code != INTERRUPTED else line, err=True)
    return code
