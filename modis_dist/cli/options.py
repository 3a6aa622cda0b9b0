"""Arguments that several commands share, and how results are printed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. optim.lr=1e-3. May be repeated."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Stay until the study has ended, and leave with its exit code.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="HOST:PORT", help="Use the Ray that runs there, on one node or more, instead of a private one."
    ),
]
ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Output folder of a run or a study.", show_default=False, exists=True, file_okay=False
    ),
]
StoreFolder = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of a store.", show_default=False, exists=True, file_okay=False)
]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))
