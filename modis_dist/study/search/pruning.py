"""Results of pruned trials: written at a rung, removed when other settings let the trials train further."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from modis_dist.evaluate.results import RESULT, read_result, read_standing, write_result
from modis_dist.execution.run_pack import (
    LAST,
    Pack,
    journal_file,
    pack_folder,
    remove_last_checkpoint,
    trial_folder,
    unfinished_packs,
)
from modis_dist.execution.trial import Trial
from modis_dist.runtime.files import remove_folder
from modis_dist.runtime.lock import locked
from modis_dist.train.journal import JournalWriter


def prune_trials(pack: Pack, reasons: Mapping[str, str], *, out: Path) -> None:
    """Write the result of the trials of a pack that are pruned: their interim result, and why they were pruned."""
    pruned = [t for t in pack.trials if t.id in reasons and read_result(trial_folder(out, t)) is None]
    interim = {trial.id: read_standing(trial_folder(out, trial)) for trial in pruned}
    if not any(interim.values()):
        return
    with locked(pack_folder(out, pack)):
        with JournalWriter(journal_file(out, pack)) as journal:
            for trial in pruned:
                if (result := interim[trial.id]) is not None:  # else it crashed
                    journal.event(trial.id, kind="end", values={"status": "pruned", "epochs": result["epochs"]})
                    write_result(trial_folder(out, trial), result | {"status": "pruned", "reason": reasons[trial.id]})
        if not unfinished_packs(out, [replace(pack, until=None)]):
            remove_last_checkpoint(out, pack)


def unprune_trials(trials: Sequence[Trial], packs: Sequence[Pack], *, out: Path) -> None:
    """Remove the results of pruned trials; their packs start again, since the state of pruned members is gone."""
    for pack in packs:
        with locked(pack_folder(out, pack)):
            remove_folder(pack_folder(out, pack) / LAST)
    for trial in trials:
        (trial_folder(out, trial) / RESULT).unlink(missing_ok=True)
