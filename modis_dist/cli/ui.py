"""`modis-dist ui`: serve the MLflow UI of a study."""

from typing import Annotated

import typer

from modis_dist.cli.options import OutputFolder


def ui(
    directory: OutputFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free port.")] = 0,
) -> None:
    """Update the MLflow store of a study and serve the MLflow UI on this machine until Ctrl-C.

    Example: `modis-dist ui runs/quickstart`
    """
    from modis_dist.integrations.mlflow.ui import serve

    code = serve(directory, port=port)
    if code:
        raise typer.Exit(code)
