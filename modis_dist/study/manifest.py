"""From a study to its list of trials, and the file that holds the list.

A trial's name is the hash of what it learns from and how: the same study on the same data always has the same trials,
so a sweep that was killed continues with what is not done yet, and nothing is run twice.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from modis_dist.config.keys import is_whole
from modis_dist.config.parse import Tree, build, to_tree, with_settings
from modis_dist.config.run import Run
from modis_dist.config.study import OptunaSearch, Study, Sweep
from modis_dist.execution.trial import ONLY_CONDITION, Trial, trial_id
from modis_dist.runtime.errors import ConfigError, DataError
from modis_dist.runtime.files import write_json
from modis_dist.study.search.space import drawn

VERSION = 2
MOST_TRIALS = 100_000
FIXED = ("data.store", "data.simulate", "data.split", "trainer.metric", "seed", "name", "sweep")
FIXED_IN_CHOICE = (
    "data.modalities",
    "data.classes",
)  # conditions may have other rows, what is chosen among may not


@dataclass(frozen=True)
class Manifest:
    """The trials of a sweep and the packs they are trained in; conditions may share a trial."""

    study: str
    fingerprint: str  # of the data
    trials: tuple[Trial, ...]
    packs: tuple[tuple[str, ...], ...]  # trial ids
    refit_packs: tuple[tuple[str, ...], ...] = ()  # known once configurations are chosen


def expand(
    study: Study, fingerprint: str, *, source: str, proposed: Sequence[Mapping[str, Any]] = ()
) -> tuple[Trial, ...]:
    """Conditions x configurations x folds x replicates, in this order; equal trials of one condition are listed once.

    Configurations are the grid, or those drawn, with those ``proposed`` in later rounds: condition -> configurations.
    Raises ``ConfigError`` for keys or values that no run accepts, before anything is started.
    """
    sweep = study.sweep
    conditions = sweep.conditions or {ONLY_CONDITION: {}}
    _check(study, len(conditions) * _configurations(sweep) * sweep.folds * sweep.replicates, source)
    first = _first_round(sweep)
    most = _configurations(sweep)
    base = to_tree(study.base())
    trials: dict[tuple[str, str], Trial] = {}
    for condition, settings in conditions.items():
        under = with_settings(base, settings, source=f"{source}: sweep.conditions.{condition}")
        later = [params for following in proposed for params in following[condition]]
        for number, params in enumerate([*first, *later][:most]):
            tree = with_settings(under, params, source=f"{source}: sweep.grid")
            where = f"{source}: sweep, condition {condition}, configuration {number} ({params})"
            for fold, replicate in product(range(sweep.folds), range(sweep.replicates)):
                run = build(Run, _placed(tree, study, fold, replicate), source=where)
                name = trial_id(run, fingerprint)
                held = fold if sweep.folds > 1 else None
                trial = Trial(name, condition, number, params, held, replicate, run)
                trials.setdefault((condition, name), trial)
    return tuple(trials.values())


def _configurations(sweep: Sweep) -> int:
    """How many configurations are tried in the end."""
    return prod(map(len, sweep.grid.values())) if sweep.search is None else sweep.search.configurations


def _first_round(sweep: Sweep) -> list[dict[str, Any]]:
    """The configurations that depend on no result."""
    search = sweep.search
    if search is None:
        return [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    count = search.round_size if isinstance(search, OptunaSearch) else search.configurations
    return [drawn(sweep.space, seed=search.seed, number=number) for number in range(count)]


def refit(trial: Trial, fingerprint: str, *, epochs: int) -> Trial:
    """The trial that trains a chosen configuration on all training rows, for a number of epochs found before."""
    settings = {
        "data.split.folds": None,
        "data.split.fold": None,
        "data.split.validation_fraction": 0.0,
        "trainer.early_stopping": None,
        "optim.epochs": epochs,
    }
    run = build(Run, with_settings(to_tree(trial.run), settings, source="refit"), source="refit")
    return Trial(
        trial_id(run, fingerprint), trial.condition, trial.configuration, trial.params, None, trial.replicate, run
    )


def save(path: Path, manifest: Manifest) -> None:
    """Write the list, before the first trial starts."""
    trials = [trial.as_tree() for trial in manifest.trials]
    content = {
        "version": VERSION,
        "study": manifest.study,
        "fingerprint": manifest.fingerprint,
        "packs": manifest.packs,
        "refit_packs": manifest.refit_packs,
        "trials": trials,
    }
    write_json(path, content)


def load(path: Path) -> Manifest:
    """Read the list. Raises ``DataError`` where it is damaged."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(f"{path}: format version {content['version']}; this program reads version {VERSION}")
        trials = tuple(Trial.from_tree(tree, source=str(path)) for tree in content["trials"])
        packs, again = (tuple(tuple(pack) for pack in content[key]) for key in ("packs", "refit_packs"))
        return Manifest(content["study"], content["fingerprint"], trials, packs, again)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is not the manifest of a sweep ({type(error).__name__})") from None


def _placed(tree: Tree, study: Study, fold: int, replicate: int) -> Tree:
    """A run's tree with its fold and seed."""
    settings: dict[str, Any] = {"seed": study.seed + replicate}
    if study.sweep.folds > 1:
        settings |= {"data.split.folds": study.sweep.folds, "data.split.fold": fold}
    return with_settings(tree, settings, source="sweep")


def _check(study: Study, total: int, source: str) -> None:
    problems = []
    if total > MOST_TRIALS:
        problems.append(f"sweep: {total} trials exceed the maximum of {MOST_TRIALS}")
    sweep = study.sweep
    conditions = [*sweep.conditions.values()]
    for place, keys in (("grid", [sweep.grid]), ("space", [sweep.space]), ("conditions", conditions)):
        problems += [
            f"sweep.{place}: {key}: cannot be swept, because the trials would not be comparable"
            for settings in keys
            for key in settings
            if _is_under(key, FIXED + FIXED_IN_CHOICE * (place != "conditions"))
        ]
    for place, chosen in (("grid", set(sweep.grid)), ("space", set(sweep.space))):
        overlap = {k for settings in conditions for k in settings} & chosen
        problems += [f"sweep: {key} is set by both sweep.{place} and sweep.conditions" for key in sorted(overlap)]
    problems += [
        f"sweep.space: {key}: step must be an integer (got {one.step:g})"
        for key, one in sweep.space.items()
        if one.step is not None and one.step % 1 and is_whole(key)
    ]
    problems += _mistakes_in_pruning(study)
    if study.sweep.folds == 1 and study.data.split.validation_fraction == 0:
        problems.append("data.split.validation_fraction: must be > 0 to select a configuration, or set sweep.folds")
    if study.data.split.folds is not None:
        problems.append("data.split.folds: not allowed in a study; set sweep.folds")
    if problems:
        raise ConfigError(problems, source=source)


def _mistakes_in_pruning(study: Study) -> list[str]:
    """Rungs at which there is nothing to compare, or nothing left to save."""
    pruning, optim, trainer = study.sweep.pruning, study.optim, study.trainer
    if pruning is None:
        return []
    problems = []
    swept = {*study.sweep.grid, *study.sweep.space}
    if pruning.min_epochs >= optim.epochs and "optim.epochs" not in swept:
        problems.append(
            f"sweep.pruning.min_epochs: must be < optim.epochs ({optim.epochs}); otherwise nothing is pruned"
        )
    if pruning.min_epochs < trainer.validate_every:
        problems.append(
            f"sweep.pruning.min_epochs: must be >= trainer.validate_every ({trainer.validate_every}); "
            "otherwise there is no validation before the first rung"
        )
    return problems


def _is_under(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def unique(trials: Iterable[Trial]) -> list[Trial]:
    """Every trial once, in the order of its first appearance."""
    return list({trial.id: trial for trial in reversed(list(trials))}.values())[::-1]
