"""Measure the overhead of Ray: its start, the first pack, gaps between packs, the next stage, several ranks.

`python tools/ray_startup.py` starts a private Ray three times in one process: alone, for two stages of small packs, as
in search and refit, and for one training on two ranks. Run it on an idle machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from modis_dist.config.parse import build
from modis_dist.config.run import Run
from modis_dist.config.study import Study
from modis_dist.execution.run_pack import Pack, pack_folder
from modis_dist.integrations.ray.private_cluster import PrivateRay, private_cluster
from modis_dist.integrations.ray.train import train_run_on_ranks
from modis_dist.integrations.ray.tune import RayExecutor
from modis_dist.study.plan import plan
from modis_dist.train.callbacks import NullReporter
from modis_dist.train.journal import read

TREE = {
    "name": "startup",
    "data": {"simulate": {"samples": 200, "classes": 3, "seed": 1}, "split": {"validation_fraction": 0.3}},
    "model": {"latent": 8, "ratios": [0.25, 0.125], "discriminator": [32, 16]},
    "optim": {"epochs": 4},
}


def cluster_seconds() -> dict[str, float]:
    """Measure the start and stop of Ray alone."""
    begin = time.monotonic()
    with private_cluster(cpus=2, gpus=0):
        started = time.monotonic()
    return {"start": started - begin, "stop": time.monotonic() - started}


def stage_seconds(executor: RayExecutor, packs: Sequence[Pack], *, out: Path, store: Path) -> dict[str, float]:
    """Measure one stage: before the first pack, idle between packs, after the last pack."""
    start = time.time()
    reasons = executor.execute(packs, out=out, store=store)
    end = time.time()
    if reasons:
        raise SystemExit(f"packs crashed: {reasons}")
    spans = []
    for pack in packs:
        times = [record["time_ms"] / 1000 for record in read(pack_folder(out, pack) / "journal.jsonl")]
        spans.append((min(times), max(times)))
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    slots = min(executor.slots, len(packs))
    training = sum(ended - began for began, ended in spans)
    return {
        "packs": len(packs),
        "before_first_pack": first - start,
        "idle_per_pack": max(0.0, ((last - first) * slots - training) / len(packs)),
        "after_last_pack": end - last,
        "training_per_pack": training / len(packs),
    }


def ranks_seconds(out: Path) -> dict[str, float]:
    """Measure a training on two ranks: before its first record and after its last."""
    run = build(Run, TREE | {"trainer": {"workers": 2}}, source="startup")
    start = time.time()
    train_run_on_ranks(run, out=out, source="startup", reporter=NullReporter(), backend=PrivateRay())
    end = time.time()
    times = [record["time_ms"] / 1000 for record in read(out / "journal.jsonl")]
    return {"before_training": min(times) - start, "training": max(times) - min(times), "after": end - max(times)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=8, help="packs of the first stage; the second has one")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    options = parser.parse_args()
    sweep = {"replicates": options.packs + 1, "packing": {"enabled": False}, "probe": False}
    study = build(Study, TREE | {"sweep": sweep}, source="startup")
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("starting Ray alone", total=5)
        report["cluster_s"] = cluster_seconds()
        bars.update(task, advance=1, description="first stage, with its Ray")
        out = Path(name)
        with RayExecutor(study.sweep.resources, backend=PrivateRay()) as executor:
            planned = plan(study, out=out, slots=executor.slots, source="startup")
            packs, store = planned.packs(), planned.store.path
            report["first_stage_s"] = stage_seconds(executor, packs[:-1], out=out, store=store)
            bars.update(task, advance=1, description="second stage, same Ray")
            report["second_stage_s"] = stage_seconds(executor, packs[-1:], out=out, store=store)
            bars.update(task, advance=1, description="stopping Ray")
            begin = time.monotonic()
        report["stop_s"] = time.monotonic() - begin
        bars.update(task, advance=1, description="two ranks")
        report["ranks_s"] = ranks_seconds(out / "ranks")
        bars.update(task, advance=1, description="done")
    report = json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 2))
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"Ray alone: {report['cluster_s']['start']} s to start, {report['cluster_s']['stop']} s to stop")
    for stage in ("first", "second"):
        seconds = report[f"{stage}_stage_s"]
        started = "starting Ray included, " if stage == "first" else ""
        print(f"{stage} stage: {seconds['packs']} packs of {seconds['training_per_pack']} s")
        print(f"  {seconds['before_first_pack']} s until the first trains ({started}loading torch in a worker)")
        print(f"  {seconds['idle_per_pack']} s idle for each, {seconds['after_last_pack']} s after the last")
    seconds = report["ranks_s"]
    print(f"two ranks: {seconds['before_training']} s until they train (starting Ray included)")
    print(f"  {seconds['after']} s after training")


if __name__ == "__main__":
    main()
