"""The training of a study that is not a plain grid: round by round, and within a round from rung to rung.

At a rung the configurations of a round are compared, and all but the best are pruned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from modis_dist.config.study import Study
from modis_dist.evaluate.results import RESULT, read_history, read_interim_result, read_result, write_result
from modis_dist.execution.run_pack import (
    LAST,
    Pack,
    journal_file,
    pack_folder,
    remove_last_if_done,
    trial_folder,
)
from modis_dist.execution.trial import Trial
from modis_dist.runtime.files import remove_folder
from modis_dist.runtime.lock import locked
from modis_dist.study.aggregate import Configuration, Results, Verdict, by_configuration, grouped
from modis_dist.study.manifest import unique
from modis_dist.study.plan import Plan
from modis_dist.study.runner import PackRunner
from modis_dist.study.search.halving import best_up_to, verdict_message
from modis_dist.study.search_state import Groups, RungDecision, SearchState
from modis_dist.study.summary import failures
from modis_dist.train.journal import JournalWriter


class SearchOutcome(NamedTuple):
    """The outcome of a search."""

    trials: tuple[Trial, ...]  # of all rounds
    pruned: dict[Configuration, Verdict]
    reasons: dict[str, str]  # crash reasons by trial id


def is_grid(study: Study, results: Results) -> bool:
    """Return whether a study is a plain grid: it neither searches nor prunes, and no earlier start pruned."""
    was_pruned = any(result["status"] == "pruned" for result in results.values())
    return study.sweep.search is None and study.sweep.pruning is None and not was_pruned


def run_search(planned: Plan, runner: PackRunner, *, out: Path) -> SearchOutcome:
    """Train the trials of every round; a round is proposed from the results of those before it."""
    search = SearchState(planned.study, planned.manifest.fingerprint, out=out, source=planned.study.name)
    reasons: dict[str, str] = {}
    for number in range(search.total_rounds):
        if number == search.known_rounds:
            results = runner.results(search.trials)
            search.propose(grouped(search.trials, results, reasons | failures(results), search.pruned))
            runner.add_packs(search.trials)
        trials = search.round(number)
        name = f"round {number + 1}" if search.total_rounds > 1 else "search"
        reasons |= Round(trials, search, runner, out=out, name=name).train()
    return SearchOutcome(search.trials, search.pruned, reasons)


class Round:
    """Configurations that are compared with each other: those still training, and the trials that crashed."""

    def __init__(
        self, trials: Sequence[Trial], search: SearchState, runner: PackRunner, *, out: Path, name: str
    ) -> None:
        self._trials = trials
        self._search = search
        self._runner = runner
        self._out = out
        self._name = name
        self._remaining: Groups = by_configuration(trials)
        self._crashed: dict[str, str] = {}

    def train(self) -> dict[str, str]:
        """Train up to each rung, then to the end; return crash reasons by trial id.

        A configuration that is not among the best of its condition at a rung is pruned there. Rungs that were decided
        before an interruption are not trained again.
        """
        for epoch in self._search.rungs(self._trials):
            if len(self._remaining) == len({condition for condition, _ in self._remaining}):
                break  # nothing is left to compare
            decision = self._search.stored_rung_decision(self._remaining, epoch)
            if decision is None:
                self._train_until(epoch)
                decision = self._search.decide_rung(self._remaining, epoch, *self._values(epoch))
            self._prune(decision)
        self._train_until(None)
        return self._crashed

    def _members(self) -> list[Trial]:
        return unique(trial for group in self._remaining.values() for trial in group)

    def _train_until(self, epoch: int | None) -> None:
        """Train the remaining trials that did not crash, up to an epoch or to their end."""
        self._unprune(epoch)
        in_round = {trial.id for trial in self._trials}
        to_train = {trial.id for trial in self._members()} - self._crashed.keys()
        packs = [
            # 0: nothing to train, but a killed process may have left its last checkpoint
            replace(pack, until=0 if to_train.isdisjoint(pack.ids) else epoch)
            for pack in self._runner.packs()
            if not in_round.isdisjoint(pack.ids)
        ]
        name = self._name if epoch is None else f"{self._name} to epoch {epoch}"
        self._crashed |= self._runner.train(packs, name=name)

    def _unprune(self, epoch: int | None) -> None:
        """Restart trials that were pruned under other settings and are now to be trained further."""
        results = self._runner.results(self._members())
        restarted = [
            trial
            for trial in self._members()
            if (result := results.get(trial.id)) is not None
            and result["status"] == "pruned"
            and (epoch is None or result["epochs"] < epoch)
        ]
        if restarted:
            ids = {trial.id for trial in restarted}
            old = [pack for pack in self._runner.packs() if not ids.isdisjoint(pack.ids)]
            unprune_trials(restarted, old, out=self._out)
            self._runner.add_packs(self._search.trials, without=old)

    def _values(self, epoch: int) -> tuple[dict[str, float | None], dict[str, str]]:
        """Return the value of each trial at a rung, None for a failed one, and the crash reasons."""
        members = self._members()
        failed = {*self._crashed, *failures(self._runner.results(members))}
        values: dict[str, float | None] = dict.fromkeys(trial.id for trial in members)
        for trial in members:
            if trial.id not in failed:
                history = read_history(trial_folder(self._out, trial))
                values[trial.id] = best_up_to(history, epoch, metric=trial.run.trainer.metric)
        return values, {trial.id: self._crashed[trial.id] for trial in members if trial.id in self._crashed}

    def _prune(self, decision: RungDecision) -> None:
        """Prune the configurations that are not among the best."""
        verdicts = dict(zip(self._remaining, decision["verdicts"], strict=True))
        pruned = {key: group for key, group in self._remaining.items() if not verdicts[key]["promoted"]}
        self._remaining = {key: group for key, group in self._remaining.items() if key not in pruned}
        self._search.pruned |= {key: verdicts[key] for key in pruned}
        remaining = {trial.id for trial in self._members()}  # conditions may share a trial
        reasons = {
            trial.id: verdict_message(verdicts[key])
            for key, group in pruned.items()
            for trial in group
            if trial.id not in remaining
        }
        for pack in self._runner.packs():
            prune_trials(pack, reasons, out=self._out)
        self._crashed |= {trial: reason for trial, reason in decision["failed"].items() if trial in reasons}


def prune_trials(pack: Pack, reasons: Mapping[str, str], *, out: Path) -> None:
    """Write the results of the pruned trials of a pack: their interim results with the reasons for pruning."""
    pruned = [t for t in pack.trials if t.id in reasons and read_result(trial_folder(out, t)) is None]
    interim = {trial.id: read_interim_result(trial_folder(out, trial)) for trial in pruned}
    if not any(interim.values()):
        return
    with locked(pack_folder(out, pack)):
        with JournalWriter(journal_file(out, pack)) as journal:
            for trial in pruned:
                if (result := interim[trial.id]) is not None:  # else it crashed
                    journal.event(trial.id, kind="end", values={"status": "pruned", "epochs": result["epochs"]})
                    write_result(trial_folder(out, trial), result | {"status": "pruned", "reason": reasons[trial.id]})
        remove_last_if_done(pack_folder(out, pack), (trial_folder(out, trial) for trial in pack.trials))


def unprune_trials(trials: Sequence[Trial], packs: Sequence[Pack], *, out: Path) -> None:
    """Remove the results of pruned trials; their packs start again, since the state of pruned members is gone."""
    for pack in packs:
        with locked(pack_folder(out, pack)):
            remove_folder(pack_folder(out, pack) / LAST)
    for trial in trials:
        (trial_folder(out, trial) / RESULT).unlink(missing_ok=True)
