"""`modis-dist ui` and `modis-dist mlflow-sync`: the MLflow UI of a study, and its copy in an MLflow store."""

from typing import Annotated

import typer

from modis_dist.cli.options import Json, OutputFolder, print_json


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


def mlflow_sync(
    directory: OutputFolder,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Repeat at idle priority until the study has ended and MLflow is up to date."),
    ] = False,
    uri: Annotated[
        str | None,
        typer.Option("--uri", metavar="URI", help="Tracking URI; default: the study's.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Send parameters, metrics, figures and the delivered model of a study to MLflow.

    Only missing entries are sent, so the command may be stopped and repeated at any time. `tune` runs it in the
    background with `--follow`; `ui` and `fetch` run it once. Run it by hand after MLflow was down, or to fill another
    tracking server.

    Example: `modis-dist mlflow-sync runs/mine`

    To another server: `modis-dist mlflow-sync runs/mine --uri http://host:5000`
    """
    from dataclasses import asdict

    from modis_dist.integrations.mlflow import follower
    from modis_dist.integrations.mlflow.sync import describe, sync
    from modis_dist.runtime.errors import ModisError, RunFailed

    try:
        result = follower.follow(directory, uri) if follow else sync(directory, uri)
    except ModisError:
        raise
    except Exception as error:
        problem = describe(error, directory, uri)
        raise RunFailed(f"MLflow: {problem}; rerun the same command") from error
    if as_json:
        print_json(asdict(result))
        return
    state = "still running" if result.running else "complete" if result.complete else "not complete"
    typer.echo(f"{result.uri}: {result.trials} trials, {result.metrics} new values; the study is {state} in MLflow")
    for problem in result.problems:
        typer.echo(f"note: {problem}", err=True)
