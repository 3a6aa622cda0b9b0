"""`modis-dist doctor`: whether this machine, or a cluster, is ready, and what to do where it is not."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, print_json

if TYPE_CHECKING:
    from modis_dist.runtime.finding import Finding

STYLES = {"good": "green", "warning": "yellow", "bad": "bold red"}
LEVEL_WIDTH, WHAT_WIDTH = 8, 22


def doctor(
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="PROFILE.yaml", help="Ask the cluster of this site profile too.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where results will go; this folder by default.", file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look whether all is there that trainings need, and say what to do where it is not. Changes nothing.

    Example: `modis-dist doctor --cluster cluster/generic_gpu.yaml --out /scratch/me`
    """
    from dataclasses import asdict

    from modis_dist.config.cluster import load_site
    from modis_dist.integrations.doctor.checks import examine
    from modis_dist.integrations.slurm.job_script import requests
    from modis_dist.runtime.errors import RunFailed

    site = load_site(cluster) if cluster is not None else None
    asked = requests(site, nodes=site.nodes) if site is not None else []
    found = []
    for finding in examine(site, requests=asked, folder=out or Path(), profile=str(cluster)):
        found.append(finding)
        if not as_json:
            print_finding(finding)
    if as_json:
        print_json([asdict(finding) for finding in found])
    bad = [finding.what for finding in found if finding.level == "bad"]
    if bad:
        raise RunFailed(f"doctor: {len(bad)} of {len(found)} findings are bad ({', '.join(bad)}); each says what to do")


def print_finding(finding: "Finding") -> None:
    """One line, and another with the advice."""
    from rich.text import Text

    from modis_dist.report.terminal import stdout

    console = stdout()
    mark = Text(f"{finding.level:<{LEVEL_WIDTH}}", style=STYLES[finding.level])
    console.print(mark + Text(f"{finding.what:<{WHAT_WIDTH}}{finding.found}"), soft_wrap=True)
    if finding.advice:
        console.print(" " * LEVEL_WIDTH + finding.advice, markup=False, soft_wrap=True)
