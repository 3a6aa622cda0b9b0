"""A round of a search from rung to rung: packs are trained up to each, and the worst configurations pruned there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modis_dist.evaluate.results import read_history
from modis_dist.execution.run_pack import trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.study.aggregate import by_configuration
from modis_dist.study.manifest import unique
from modis_dist.study.runner import PackRunner
from modis_dist.study.search.halving import best_up_to, verdict_message
from modis_dist.study.search.pruning import prune_trials, unprune_trials
from modis_dist.study.search.rounds import Groups, Search
from modis_dist.study.summary import failures


class Round:
    """Configurations that are compared with each other: those still training, and the trials that crashed."""

    def __init__(self, trials: Sequence[Trial], search: Search, runner: PackRunner, *, out: Path, name: str) -> None:
        self._trials = trials
        self._search = search
        self._runner = runner
        self._out = out
        self._name = name
        self._remaining: Groups = by_configuration(trials)
        self._crashed: dict[str, str] = {}

    def train(self) -> dict[str, str]:
        """Train up to each rung, then to the end; returns why trials crashed, by id.

        A configuration that is not among the best of its condition at a rung is pruned there. Rungs that were decided
        before an interruption are not trained again.
        """
        for epoch in self._search.rungs(self._trials):
            if len(self._remaining) == len({condition for condition, _ in self._remaining}):
                break  # nothing is left to compare
            decision = self._search.compared(self._remaining, epoch)
            if decision is None:
                self._train_until(epoch)
                decision = self._search.compare(self._remaining, epoch, *self._values(epoch))
            self._prune(decision)
        self._train_until(None)
        return self._crashed

    def _members(self) -> list[Trial]:
        return unique(trial for group in self._remaining.values() for trial in group)

    def _train_until(self, epoch: int | None) -> None:
        """Train the remaining trials that did not crash, up to an epoch or to their end."""
        self._unprune(epoch)
        of_round = {trial.id for trial in self._trials}
        to_train = {trial.id for trial in self._members()} - self._crashed.keys()
        packs = [
            # 0: packs with nothing to train are only read, since an earlier start may not have read all their records
            replace(pack, until=0 if to_train.isdisjoint(pack.ids) else epoch)
            for pack in self._runner.packs()
            if not of_round.isdisjoint(pack.ids)
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
        """Return the value of each trial at a rung, None for a failed one, and why trials crashed."""
        members = self._members()
        failed = {*self._crashed, *failures(self._runner.results(members))}
        values: dict[str, float | None] = dict.fromkeys(trial.id for trial in members)
        for trial in members:
            if trial.id not in failed:
                history = read_history(trial_folder(self._out, trial))
                values[trial.id] = best_up_to(history, epoch, metric=trial.run.trainer.metric)
        return values, {trial.id: self._crashed[trial.id] for trial in members if trial.id in self._crashed}

    def _prune(self, decision: Mapping[str, Any]) -> None:
        """Prune the configurations that are not among the best."""
        verdicts = dict(zip(self._remaining, decision["verdicts"], strict=True))
        pruned = {key: group for key, group in self._remaining.items() if not verdicts[key]["goes_on"]}
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
