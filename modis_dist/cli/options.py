"""Options shared by several commands, and JSON output."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. optim.lr=1e-3. Repeatable."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Block until the study finishes; exit with its exit code.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="HOST:PORT", help="Connect to a running Ray cluster; by default a private one is started."
    ),
]
ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Output folder of a run or study.", show_default=False, exists=True, file_okay=False
    ),
]
StoreFolder = Annotated[
    Path, typer.Argument(metavar="STORE", help="Store folder.", show_default=False, exists=True, file_okay=False)
]


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))
