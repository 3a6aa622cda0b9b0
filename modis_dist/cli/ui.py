"""``modis-dist ui DIR``: the MLflow pages of a study in a browser."""

from pathlib import Path
from typing import Annotated

import typer


def ui(
    directory: Annotated[
        Path, typer.Argument(help="Output folder of a study or of one of its trials.", show_default=False)
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Bring MLflow up to date with a study and serve its pages on this machine until Ctrl-C.

    Example: `modis-dist ui runs/quickstart`
    """
    from modis_dist.integrations.mlflow.ui import serve

    code = serve(directory, port=port)
    if code:
        raise typer.Exit(code)
