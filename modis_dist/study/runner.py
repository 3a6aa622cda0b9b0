"""Train packs of a study with its executor and keep the manifest up to date."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from modis_dist.evaluate.results import Result, read_result
from modis_dist.execution.run_pack import (
    Pack,
    journal_file,
    pack_folder,
    remove_last_if_done,
    trial_folder,
    unfinished_packs,
)
from modis_dist.execution.trial import Trial
from modis_dist.study import manifest
from modis_dist.study.interfaces import Executor
from modis_dist.study.manifest import unique
from modis_dist.study.monitor import Display, monitored
from modis_dist.study.packs import arrange_packs
from modis_dist.study.plan import Plan, ids_of, is_done
from modis_dist.train.journal import copy_trial


class PackRunner:
    """The packs of one study, with the executor that trains them and the display."""

    def __init__(self, planned: Plan, out: Path, executor: Executor, display: Display) -> None:
        self._planned = planned
        self._manifest = planned.manifest
        self._out = out
        self._executor = executor
        self._display = display

    def packs(self) -> list[Pack]:
        """Return the packs of the search."""
        return replace(self._planned, manifest=self._manifest).packs()

    def add_packs(self, trials: Sequence[Trial], *, without: Sequence[Pack] = ()) -> None:
        """Arrange trials of the search that are not done and in no pack, or in one of ``without``, into packs."""
        dropped = ids_of([pack.trials for pack in without])
        earlier = [pack for pack in self._manifest.packs if pack not in dropped]
        packs = ids_of(self._arrange(unique(trials), earlier))
        self._save(replace(self._manifest, trials=tuple(trials), packs=packs))

    def refit_packs(self, trials: Sequence[Trial]) -> list[Pack]:
        """Return the packs of the refits, which are scored on test rows."""
        probe = self._planned.study.sweep.probe
        packs = [Pack(pack, "test", probe) for pack in self._arrange(trials, self._manifest.refit_packs)]
        self._save(replace(self._manifest, refit_packs=ids_of([pack.trials for pack in packs])))
        return packs

    def _arrange(self, trials: Sequence[Trial], earlier: Sequence[Sequence[str]]) -> tuple[tuple[Trial, ...], ...]:
        return arrange_packs(
            trials,
            self._planned.selection_of,
            earlier=earlier,
            done=partial(is_done, self._out),
            max_pack_size=self._planned.max_pack_size,
            slots=self._executor.slots,
        )

    def _save(self, changed: manifest.Manifest) -> None:
        self._manifest = changed
        manifest.save(self._out / manifest.FILE, changed)

    def train(self, packs: Sequence[Pack], *, name: str) -> dict[str, str]:
        """Train packs; return crash reasons by trial id. Members of a crashed stack are retried one by one."""
        reasons = self._execute(packs, name=name)
        stacks = [pack for pack in packs if len(pack.trials) > 1 and not reasons.keys().isdisjoint(pack.ids)]
        if not stacks:
            return reasons
        # A single member may have crashed its stack.
        singles = [single for stack in stacks for single in self._split(stack)]
        self._replace_packs(stacks, singles)
        retried = {trial for single in singles for trial in single.ids}
        others = {trial: reason for trial, reason in reasons.items() if trial not in retried}
        return others | self._execute(singles, name=f"{name}, crashed packs one by one")

    def _split(self, stack: Pack) -> list[Pack]:
        """Return a pack for every member of a stack, with the records of members that are done."""
        singles = [replace(stack, trials=(trial,)) for trial in stack.trials]
        for pack in singles:
            (trial,) = pack.trials
            if is_done(self._out, trial):
                copy_trial(journal_file(self._out, stack), journal_file(self._out, pack), trial=trial.id)
        return singles

    def _replace_packs(self, old: Sequence[Pack], new: Sequence[Pack]) -> None:
        """Replace packs in the manifest, so that an interrupted study resumes the new ones."""
        dropped, added = ids_of([pack.trials for pack in old]), ids_of([pack.trials for pack in new])
        packs = self._manifest.refit_packs if old[0].evaluated_on == "test" else self._manifest.packs
        changed = (*(pack for pack in packs if pack not in dropped), *added)
        if old[0].evaluated_on == "test":
            self._save(replace(self._manifest, refit_packs=changed))
        else:
            self._save(replace(self._manifest, packs=changed))

    def _execute(self, packs: Sequence[Pack], *, name: str) -> dict[str, str]:
        with monitored(packs, out=self._out, name=name, display=self._display):
            remaining = unfinished_packs(self._out, packs)
            for pack in packs:  # a killed process may have left a last checkpoint
                remove_last_if_done(pack_folder(self._out, pack), (trial_folder(self._out, t) for t in pack.trials))
            if not remaining:
                return {}
            return dict(self._executor.execute(remaining, out=self._out, store=self._planned.store.path))

    def results(self, trials: Sequence[Trial]) -> dict[str, Result]:
        """Return the results of the trials that have one, by id."""
        results = {trial.id: read_result(trial_folder(self._out, trial)) for trial in trials}
        return {name: result for name, result in results.items() if result is not None}
