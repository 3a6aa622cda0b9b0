"""`modis-dist doctor`: check that this machine or cluster is ready to train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, print_json, say

if TYPE_CHECKING:
    from modis_dist.runtime.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
LEVEL_WIDTH, CHECK_WIDTH = 8, 22


def doctor(
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="PROFILE.yaml", help="Also check the cluster of this site profile.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Output folder to check; default: current folder.", file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that this machine (or cluster) is ready to train, with a fix for each problem. Changes nothing.

    Example: `modis-dist doctor --cluster cluster/generic_gpu.yaml --out /scratch/me`
    """
    from dataclasses import asdict

    from modis_dist.config.cluster import load_site
    from modis_dist.integrations.doctor.checks import examine
    from modis_dist.runtime.errors import RunFailed

    site = load_site(cluster) if cluster is not None else None
    findings = []
    for finding in examine(site, folder=out or Path(), profile=str(cluster)):
        findings.append(finding)
        if not as_json:
            print_finding(finding)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    errors = [finding.check for finding in findings if finding.level == "error"]
    if errors:
        raise RunFailed(f"doctor: {len(errors)} of {len(findings)} checks failed ({', '.join(errors)})")


def print_finding(finding: "Finding") -> None:
    """Print a finding in one line, and its fix in another."""
    from rich.text import Text

    from modis_dist.report.terminal import stdout

    level = Text(f"{finding.level:<{LEVEL_WIDTH}}", style=STYLES[finding.level])
    stdout().print(level + Text(f"{finding.check:<{CHECK_WIDTH}}{finding.message}"), soft_wrap=True)
    if finding.fix:
        say(" " * LEVEL_WIDTH + finding.fix)
