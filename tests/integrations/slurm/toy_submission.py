"""A small study for tests of submissions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modis_dist.config import parse
from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.evaluate.results import write_result
from modis_dist.integrations.slurm import submission, submit
from modis_dist.integrations.slurm.submission import load
from modis_dist.study.plan import Plan, plan
from tests import toy_results
from tests.study.toy_study import tree

SINGLE = {"packing": {"enabled": False}, "probe": False}


def study(store: Path, *overrides: str, **sweep: Any) -> Study:
    return parse.build(Study, parse.with_overrides(tree(store, **{**SINGLE, **sweep}), overrides), source="study.yaml")


def site(**keys: Any) -> Site:
    return Site(**{"max_array": 3, "python": ("python3",), **keys})


def planned(store: Path, out: Path) -> Plan:
    return plan(study(store), out=out, slots=10, source="study.yaml", gpu=False)


def submitted(store: Path, out: Path, **keys: Any) -> submission.Submission:
    return submit.submit(planned(store, out), site(**keys), form="array", out=out)


def finish_packs(out: Path, numbers: Sequence[int]) -> None:
    """Write results as if the tasks of these packs had finished."""
    conclude(out, [trial for number in numbers for trial in load(out).packs[number]])


def conclude(out: Path, trials: Sequence[str]) -> None:
    """Write a result for these trials."""
    for trial in trials:
        (out / "trials" / trial).mkdir(parents=True)
        write_result(out / "trials" / trial, toy_results.result(trial))


def rows(sent: Sequence[submission.SentJob]) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(job.kind, job.first, job.indices) for job in sent]
