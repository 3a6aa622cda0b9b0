"""Options shared by several commands, and output of lines and JSON."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Study configuration.", show_default=False)]
OutputFolder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Output folder of a study or run.", show_default=False, exists=True, file_okay=False
    ),
]
StoreFolder = Annotated[
    Path, typer.Argument(metavar="STORE", help="Store folder.", show_default=False, exists=True, file_okay=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a configuration key, e.g. optim.lr=1e-3; may be repeated."
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Block until the study finishes; exit with its status code.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", metavar="HOST:PORT", help="Address of a running Ray cluster; default: start a private one."),
]


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def say(line: str) -> None:
    """Print a line on standard output, without markup and line breaks."""
    from modis_dist.report.terminal import stdout

    stdout().print(line, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    """Print a line on standard error, without markup and line breaks."""
    from modis_dist.cli.display import errors

    errors().print(line, markup=False)
