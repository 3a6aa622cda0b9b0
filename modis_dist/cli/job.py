"""`modis-dist job`: commands that jobs run, not people."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="What the jobs of a cluster run.", no_args_is_help=True)


@app.command("all-reduce")
def all_reduce(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder all nodes see.", show_default=False, exists=True, file_okay=False
        ),
    ],
) -> None:
    """Sum numbers over the nodes of a job, as `modis-dist doctor` has it done.

    Example: `modis-dist job all-reduce FOLDER`
    """
    from modis_dist.launch.all_reduce import take_part

    take_part(folder)
