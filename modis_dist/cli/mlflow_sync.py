"""`modis-dist mlflow-sync`: send a study to MLflow, once or for as long as it runs."""

from typing import Annotated

import typer

from modis_dist.cli.options import Json, OutputFolder, print_json


def mlflow_sync(
    directory: OutputFolder,
    follow: Annotated[
        bool, typer.Option("--follow", help="Repeat at idle priority until the study has ended and MLflow is complete.")
    ] = False,
    uri: Annotated[
        str | None,
        typer.Option("--uri", metavar="URI", help="Tracking URI; default: the study's.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Send parameters, metrics, figures and the delivered model of a study to MLflow.

    Only what MLflow lacks is sent, so the command may be stopped and repeated at any time. `tune` runs it in the
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
