"""A study from its first trial to its summary.

1. The trials are listed and written down. 2. What is not done yet is trained, pack by pack; where the study prunes, up
to a rung, and what is among the best there further. Where Optuna proposes, this is done round by round. 3. Groups over
folds and replicates are compared on validation rows. 4. The chosen configuration is trained on all training rows and
scored, once, on the test rows. Re-running the same study on the same folder continues wherever it stopped.

The executor of the packs (Ray, this process) is a port; this module knows neither Ray nor MLflow, which reads the run
folder.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from modis_dist.config import parse
from modis_dist.evaluate.results import read_result
from modis_dist.execution.resource_errors import sound_disk
from modis_dist.execution.run_pack import Pack, forget_last, journal_file, trial_folder, unfinished
from modis_dist.execution.trial import Trial
from modis_dist.runtime.errors import RunFailed
from modis_dist.runtime.files import write_text
from modis_dist.runtime.lock import locked
from modis_dist.study import manifest
from modis_dist.study.aggregate import Group, chosen, grouped, ranked
from modis_dist.study.interfaces import Executor, Tracking
from modis_dist.study.manifest import unique
from modis_dist.study.monitor import Display, monitored
from modis_dist.study.packs import layout
from modis_dist.study.plan import Plan, ids_of, is_done
from modis_dist.study.search.rounds import Search
from modis_dist.study.search.rungs import Round
from modis_dist.study.summary import changes, failures, summarise, why_nothing, write
from modis_dist.train.journal import copy_trial


def run_study(
    planned: Plan, *, out: Path, executor: Executor, display: Display, tracking: Tracking | None = None
) -> dict[str, Any]:
    """Train, choose, refit and test; returns the summary that is also written to ``summary.json``.

    Raises ``Interrupted`` where the user stops it, ``RunFailed`` where no configuration is complete or the disk
    refuses.
    """
    started = time.monotonic()
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out, patience_s=0), sound_disk(out):
        study, listed = planned.study, planned.manifest
        metric = study.trainer.metric
        write_text(out / "study.yaml", parse.dump(study))
        manifest.save(out / "manifest.json", listed)
        if tracking is not None:
            tracking.start()
        sweep = _Sweep(planned, out, executor, display)

        # Search: every trial that is not done, round by round; a round is known when those before it are done.
        reasons = sweep.search()
        results = sweep.results(sweep.trials)
        groups = sweep.groups(reasons)
        groups = ranked(groups, metric=metric) if study.sweep.search else groups
        best = chosen(groups, metric=metric)

        # Refit: the chosen configuration of each condition, on all training rows; test rows are scored here only.
        refits = {condition: _refits(sweep.trials, group, listed.fingerprint) for condition, group in best.items()}
        again = unique(trial for group in refits.values() for trial in group)
        packs = sweep.refit_packs(again)
        reasons |= sweep.trained(packs, stage="refit")
        final = sweep.results(again)

        summary = summarise(listed, groups, best, refits, final, metric=metric)
        summary["failures"] = reasons | failures(results) | failures(final)
        summary["changes"] = changes(results) | changes(final)
        summary["mlflow"] = {"uri": tracking and tracking.uri, "experiment": tracking and tracking.experiment}
        summary["seconds"] = round(time.monotonic() - started, 1)
        write(summary, groups, out=out, metric=metric)
    if not best:
        raise RunFailed(why_nothing(summary, out))
    return summary


class _Sweep:
    """The ports of one study in motion."""

    def __init__(self, planned: Plan, out: Path, executor: Executor, display: Display) -> None:
        self._planned = planned
        self._listed = planned.manifest
        self._search = Search(planned.study, planned.manifest.fingerprint, out=out, source=planned.study.name)
        self._out = out
        self._executor = executor
        self._display = display

    @property
    def trials(self) -> Sequence[Trial]:
        """The trials of all rounds so far."""
        return self._search.trials

    def groups(self, reasons: Mapping[str, str]) -> list[Group]:
        """What they add up to; ``reasons``: why trials crashed."""
        results = self.results(self.trials)
        return grouped(self.trials, results, {**reasons, **failures(results)}, self._search.pruned)

    def search(self) -> dict[str, str]:
        """Train every round; returns why trials crashed, by id."""
        reasons: dict[str, str] = {}
        for number in range(self._search.most_rounds):
            if number == self._search.rounds:
                self._search.propose(self.groups(reasons))
                self.lay_out()
            trials = self._search.round(number)
            name = f"round {number + 1}" if self._search.most_rounds > 1 else "search"
            work = Round(trials, self._search, self, out=self._out, name=name)
            reasons |= work.train()
        return reasons

    def packs(self) -> list[Pack]:
        """The packs of all rounds so far."""
        return replace(self._planned, manifest=self._listed).packs()

    def lay_out(self, *, without: Sequence[Pack] = ()) -> None:
        """Put what is not done and in none of the packs, leaving some out, into packs; note it in the manifest."""
        left_out = ids_of([pack.trials for pack in without])
        laid = self._laid_out(unique(self.trials), [pack for pack in self._listed.packs if pack not in left_out])
        self._listed = replace(self._listed, trials=tuple(self.trials), packs=ids_of(laid))
        manifest.save(self._out / "manifest.json", self._listed)

    def _laid_out(self, trials: Sequence[Trial], earlier: Sequence[Sequence[str]]) -> tuple[tuple[Trial, ...], ...]:
        return layout(
            trials,
            self._planned.selection_of,
            earlier=earlier,
            done=partial(is_done, self._out),
            most=self._planned.most,
            slots=self._executor.slots,
        )

    def trained(self, packs: Sequence[Pack], *, stage: str, name: str = "") -> dict[str, str]:
        """Train packs; a stack that crashed once more, one by one. Returns why trials crashed, by id."""
        reasons = self._executed(packs, name=name or stage)
        down = [pack for pack in packs if len(pack.trials) > 1 and any(trial.id in reasons for trial in pack.trials)]
        if not down:
            return reasons
        # One member may have brought its stack down; the others are not to suffer for it.
        alone = [one for pack in down for one in self._one_by_one(pack)]
        tried = {pack.trials[0].id for pack in alone}
        self._note(stage, [*(pack for pack in packs if pack not in down), *alone])
        kept = {trial: reason for trial, reason in reasons.items() if trial not in tried}
        return kept | self._executed(alone, name=f"{name or stage}, crashed packs one by one")

    def _one_by_one(self, stack: Pack) -> list[Pack]:
        """Every member of a stack as a pack of its own; one that is finished takes its records along."""
        alone = [replace(stack, trials=(trial,)) for trial in stack.trials]
        for pack in alone:
            (trial,) = pack.trials
            if is_done(self._out, trial):
                copy_trial(journal_file(self._out, stack), journal_file(self._out, pack), trial=trial.id)
        return alone

    def _executed(self, packs: Sequence[Pack], *, name: str) -> dict[str, str]:
        with monitored(packs, out=self._out, name=name, display=self._display):
            remaining = unfinished(self._out, packs)
            for pack in packs:
                if pack not in remaining:
                    forget_last(self._out, pack)  # a killed process may not have come to it
            if not remaining:
                return {}
            return dict(self._executor.execute(remaining, out=self._out, store=self._planned.store.path))

    def _note(self, stage: str, packs: Sequence[Pack]) -> None:
        """Write down how some trials of a stage are laid out, so that an interrupted one continues."""
        ids, listed = ids_of([pack.trials for pack in packs]), self._listed
        if stage == "search":
            held = {name for pack in ids for name in pack}
            self._listed = replace(listed, packs=(*(pack for pack in listed.packs if held.isdisjoint(pack)), *ids))
        else:
            self._listed = replace(listed, refit_packs=ids)
        manifest.save(self._out / "manifest.json", self._listed)

    def refit_packs(self, trials: Sequence[Trial]) -> list[Pack]:
        """The packs of the refits, noted in the manifest."""
        laid = self._laid_out(trials, self._listed.refit_packs)
        packs = [Pack(pack, "test", self._planned.study.sweep.probe) for pack in laid]
        self._note("refit", packs)
        return packs

    def results(self, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
        """The results there are, by trial id."""
        found = {trial.id: self._result(trial) for trial in trials}
        return {name: result for name, result in found.items() if result is not None}

    def _result(self, trial: Trial) -> dict[str, Any] | None:
        return read_result(trial_folder(self._out, trial))


def _refits(trials: Sequence[Trial], group: Group, fingerprint: str) -> list[Trial]:
    """One refit per replicate of the chosen group, for as many epochs as its middle best epoch."""
    first: dict[int, Trial] = {}
    for trial in trials:
        if trial.condition == group["condition"] and trial.id in group["trials"]:
            first.setdefault(trial.replicate, trial)
    return [manifest.refit(trial, fingerprint, epochs=group["epochs"]) for trial in first.values()]
