"""Cost of interruptions of a study on a real Slurm cluster: seconds lost, and a check that results do not change.

`python tools/slurm_interruptions.py` (as root, on an idle machine) starts a temporary cluster of two nodes and submits
the quickstart study as an array and as an allocation: uninterrupted, preempted, requeued, with a node failure, and with
time limits that it exceeds. Each result is compared with a local run, bit for bit; exit code 3 if one differs. Seconds
lost are relative to the uninterrupted run of the same form; about eleven are Slurm's minimum delay of a requeue.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are not installed

from modis_dist.config import parse, yaml12
from modis_dist.report.tables import add, empty, finished, numbers
from modis_dist.report.terminal import show
from tests.real_slurm.cluster import Cluster, running
from tests.real_slurm.studies import PARTS, Submitted, command, submitted, summary, write_profile

STUDY = Path(__file__).resolve().parents[1] / "tune_spaces" / "quickstart.yaml"
LIMITS = {"array": "00:01:00", "allocation": "00:02:00"}  # Slurm checks every 30 s and may signal a minute early
TASK = {"array": "{}_0", "allocation": "{}"}


def nothing(study: Submitted, job: str) -> None:
    """Do nothing; the profile may have a time limit."""


def requeue(study: Submitted, job: str) -> None:
    """Requeue a job as an administrator."""
    study.cluster.run("scontrol", "requeue", job)


INTERRUPTIONS: dict[str, Callable[[Submitted, str], None]] = {
    "uninterrupted": nothing,
    "preempted": Submitted.preempt,
    "requeued": requeue,
    "node lost": Submitted.lose,
    "time limit": nothing,
}


def measured(cluster: Cluster, study: Path, out: Path, *, form: str, interruption: str) -> dict[str, Any]:
    """Submit the study, interrupt it when a pack is half done, and wait for its end."""
    keys: dict[str, Any] = {"memory": "1800M"}
    if interruption == "time limit":
        keys |= {"time": LIMITS[form], "warning_s": 20}
    profile = write_profile(out.parent / "profile.yaml", **keys, **({"nodes": 2} if form == "allocation" else {}))
    began = time.monotonic()
    sent = submitted(cluster, study, profile, out, "--form", form)
    job = TASK[form].format(sent.number)
    while not half_done(out) and sent.state() in {"running", "waiting"}:
        time.sleep(0.5)
    INTERRUPTIONS[interruption](sent, job)
    while (state := sent.state()) in {"running", "waiting", "unknown"}:
        time.sleep(0.5)
    seconds = time.monotonic() - began
    if state != "finished":
        raise SystemExit(f"{form}, {interruption}: {state}\n{sent.logs()}")
    names = ["allocation"] if form == "allocation" else ["pack-0", "pack-1", "finish"]
    return {"seconds": seconds, "starts": sum(sent.starts(name) for name in names) - len(names), "found": summary(out)}


def half_done(out: Path) -> bool:
    """Return whether a pack of the search has trained half of its epochs."""
    packs = json.loads(command("status", str(out), "--json"))["packs"]
    return any(pack["epoch"] * 2 >= (pack["epochs"] or 1) for pack in packs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=sorted(TASK), default=["array", "allocation"])
    parser.add_argument("--interruptions", nargs="+", choices=list(INTERRUPTIONS), default=list(INTERRUPTIONS))
    parser.add_argument("--epochs", type=int, default=None, help="epochs per training; default: as in the quickstart")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    overrides = ["sweep.resources.cpus=1", "sweep.executor=local"]
    overrides += [f"optim.epochs={given.epochs}"] if given.epochs else []
    rows, log = [], Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, running() as cluster:
        study = Path(folder) / "study.yaml"
        study.write_text(yaml12.dump(parse.to_tree(parse.load_study(STUDY, overrides))))
        began = time.monotonic()
        command("tune", str(study), "--out", f"{folder}/home")
        home, at_home = summary(Path(folder) / "home"), time.monotonic() - began
        log.print(f"local run: {at_home:.0f} s")
        in_environment(cluster)
        for form in given.forms:
            uninterrupted = None
            for interruption in dict.fromkeys(["uninterrupted", *given.interruptions]):
                out = Path(folder) / f"{form}-{interruption.replace(' ', '-')}"
                result = measured(cluster, study, out, form=form, interruption=interruption)
                uninterrupted = uninterrupted or result["seconds"]
                differs = [part for part in PARTS if result["found"][part] != home[part]]
                rows.append(
                    {
                        "form": form,
                        "interruption": interruption,
                        "seconds": round(result["seconds"], 1),
                        "lost": round(result["seconds"] - uninterrupted, 1),
                        "started_again": result["starts"],
                        "differs": differs,
                    }
                )
                log.print(rows[-1])
    if given.json:
        print(json.dumps({"local_run": round(at_home, 1), "rows": rows}, indent=2))
    else:
        print_table(rows)
    if any(row["differs"] for row in rows):
        sys.exit(3)


def in_environment(cluster: Cluster) -> None:
    """Set the environment of the cluster for this process and its children."""
    os.environ.update({name: cluster.env[name] for name in ("SLURM_CONF", "MUNGE_SOCKET", "PATH")})


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    table = empty("form", "interruption")
    numbers(table, "seconds", "lost", "started again", "results")
    for row in rows:
        same = "differ: " + ", ".join(row["differs"]) if row["differs"] else "equal"
        same += ", limit not reached" if row["interruption"] == "time limit" and not row["started_again"] else ""
        add(
            table,
            row["form"],
            row["interruption"],
            f"{row['seconds']:.0f}",
            f"{row['lost']:.0f}",
            str(row["started_again"]),
            same,
        )
    show([("The quickstart study on Slurm", finished(table))], Console())


if __name__ == "__main__":
    main()
