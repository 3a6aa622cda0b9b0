"""A round of a search from rung to rung: its packs are trained up to each, and what falls behind is pruned there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from modis_dist.evaluate.results import read_history
from modis_dist.execution.run_pack import Pack, prune, reopen, trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.study.aggregate import Results, by_configuration
from modis_dist.study.manifest import unique
from modis_dist.study.search.halving import best_up_to, told
from modis_dist.study.search.rounds import Groups, Search
from modis_dist.study.summary import failures


class Trainer(Protocol):
    """Who has a search's packs trained."""

    def packs(self) -> list[Pack]:
        """The packs of all rounds so far."""
        ...

    def trained(self, packs: Sequence[Pack], *, stage: str, name: str) -> dict[str, str]:
        """Train packs as far as each is to be trained; returns why trials crashed, by id."""
        ...

    def results(self, trials: Sequence[Trial]) -> Results:
        """The results there are, by trial id."""
        ...

    def lay_out(self, *, without: Sequence[Pack] = ()) -> None:
        """Put what is not done and in none of the packs, leaving some out, into packs."""
        ...


class Round:
    """Configurations that are compared with each other: those that go on, and what has crashed of them."""

    def __init__(self, trials: Sequence[Trial], search: Search, trainer: Trainer, *, out: Path, name: str) -> None:
        self._trials = trials
        self._search = search
        self._trainer = trainer
        self._out = out
        self._name = name
        self._living: Groups = by_configuration(trials)
        self._crashed: dict[str, str] = {}

    def train(self) -> dict[str, str]:
        """Train up to each rung in turn, then to the end; returns why trials crashed, by id.

        What is not among the best of its condition at a rung is pruned. A rung that was decided before an interruption
        is passed over.
        """
        for epoch in self._search.rungs(self._trials):
            if len(self._living) == len({condition for condition, _ in self._living}):
                break  # nothing is left to compare
            decision = self._search.compared(self._living, epoch)
            if decision is None:
                self._train_until(epoch)
                decision = self._search.compare(self._living, epoch, *self._standing(epoch))
            self._prune(decision)
        self._train_until(None)
        return self._crashed

    def _members(self) -> list[Trial]:
        return unique(trial for group in self._living.values() for trial in group)

    def _train_until(self, epoch: int | None) -> None:
        """Train the configurations that go on, but for trials that crashed, up to an epoch or to their end."""
        self._reopen(epoch)
        mine = {trial.id for trial in self._trials}
        wanted = {trial.id for trial in self._members()} - self._crashed.keys()
        packs = [
            # 0: of those that leave only the journals are looked at, which an earlier start may not have passed on
            replace(pack, until=0 if wanted.isdisjoint(pack.ids) else epoch)
            for pack in self._trainer.packs()
            if not mine.isdisjoint(pack.ids)
        ]
        name = self._name if epoch is None else f"{self._name} to epoch {epoch}"
        self._crashed |= self._trainer.trained(packs, stage="search", name=name)

    def _reopen(self, epoch: int | None) -> None:
        """Trials that were pruned under other settings, and are wanted further now, begin again."""
        results = self._trainer.results(self._members())
        short = [
            trial
            for trial in self._members()
            if (result := results.get(trial.id)) is not None
            and result["status"] == "pruned"
            and (epoch is None or result["epochs"] < epoch)
        ]
        if short:
            names = {trial.id for trial in short}
            old = [pack for pack in self._trainer.packs() if not names.isdisjoint(pack.ids)]
            reopen(short, old, out=self._out)
            self._trainer.lay_out(without=old)

    def _standing(self, epoch: int) -> tuple[dict[str, float | None], dict[str, str]]:
        """The value of each trial at a rung, None for one that failed; and why some crashed."""
        members = self._members()
        lost = {*self._crashed, *failures(self._trainer.results(members))}
        values: dict[str, float | None] = dict.fromkeys(trial.id for trial in members)
        for trial in members:
            if trial.id not in lost:
                history = read_history(trial_folder(self._out, trial))
                values[trial.id] = best_up_to(history, epoch, metric=trial.run.trainer.metric)
        return values, {trial.id: self._crashed[trial.id] for trial in members if trial.id in self._crashed}

    def _prune(self, decision: Mapping[str, Any]) -> None:
        """Let the configurations that are not among the best leave."""
        verdicts = dict(zip(self._living, decision["verdicts"], strict=True))
        leaving = {key: group for key, group in self._living.items() if not verdicts[key]["goes_on"]}
        self._living = {key: group for key, group in self._living.items() if key not in leaving}
        self._search.pruned |= {key: verdicts[key] for key in leaving}
        wanted = {trial.id for trial in self._members()}  # conditions may share a trial
        reasons = {t.id: told(verdicts[key]) for key, group in leaving.items() for t in group if t.id not in wanted}
        for pack in self._trainer.packs():
            prune(pack, reasons, out=self._out)
        self._crashed |= {trial: reason for trial, reason in decision["failed"].items() if trial in reasons}
