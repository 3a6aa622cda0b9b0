"""The training of a study that is not a plain grid: round by round, and within a round from rung to rung."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modis_dist.config.study import Study
from modis_dist.execution.trial import Trial
from modis_dist.study.aggregate import Configuration, grouped
from modis_dist.study.manifest import unique
from modis_dist.study.plan import Plan
from modis_dist.study.runner import PackRunner
from modis_dist.study.search.halving import Verdict
from modis_dist.study.search.rounds import Search
from modis_dist.study.search.rungs import Round
from modis_dist.study.summary import failures


class Searched(NamedTuple):
    """What a search trained."""

    trials: tuple[Trial, ...]  # of all rounds
    pruned: dict[Configuration, Verdict]
    reasons: dict[str, str]  # why trials crashed, by id


def is_grid(study: Study, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a study needs no search: it proposes and prunes nothing, nor did an earlier start prune."""
    was_pruned = any(result["status"] == "pruned" for result in results.values())
    return study.sweep.search is None and study.sweep.pruning is None and not was_pruned


def run_search(planned: Plan, runner: PackRunner, *, out: Path) -> Searched:
    """Train the trials of every round; a round is proposed from the results of those before it."""
    search = Search(planned.study, planned.manifest.fingerprint, out=out, source=planned.study.name)
    reasons: dict[str, str] = {}
    for number in range(search.most_rounds):
        if number == search.rounds:
            results = runner.results(search.trials)
            search.propose(grouped(search.trials, results, reasons | failures(results), search.pruned))
            runner.add_packs(search.trials)
        trials = search.round(number)
        name = f"round {number + 1}" if search.most_rounds > 1 else "search"
        with runner.mirrored(unique(trials), stage="search"):
            reasons |= Round(trials, search, runner, out=out, name=name).train()
    return Searched(search.trials, search.pruned, reasons)
