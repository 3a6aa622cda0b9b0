"""The list of a study's trials, and the file that stores it.

A trial's id is the hash of its data and settings: the same study on the same data always has the same trials, so a
killed study resumes with the trials that are not done, and no trial runs twice.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from modis_dist.config.keys import is_whole
from modis_dist.config.parse import Tree, build, to_tree, with_settings
from modis_dist.config.run import Run
from modis_dist.config.study import OptunaSearch, Study, Sweep
from modis_dist.execution.trial import ONLY_CONDITION, Trial, trial_id
from modis_dist.report.study_results import Params
from modis_dist.runtime.errors import ConfigError, DataError
from modis_dist.runtime.files import write_json
from modis_dist.study.search.space import drawn

FILE, STUDY_FILE = "manifest.json", "study.yaml"
VERSION = 2
MAX_TRIALS = 100_000
FIXED = ("data.store", "data.simulate", "data.split", "trainer.metric", "seed", "name", "sweep")
FIXED_IN_CHOICE = ("data.modalities", "data.classes")  # may differ between conditions, not within one


@dataclass(frozen=True)
class Manifest:
    """The trials of a study and the packs they are trained in; conditions may share a trial."""

    study: str
    fingerprint: str  # of the data
    trials: tuple[Trial, ...]
    packs: tuple[tuple[str, ...], ...]  # trial ids
    refit_packs: tuple[tuple[str, ...], ...] = ()  # empty until configurations are chosen

    @property
    def refit_ids(self) -> list[str]:
        """Return the ids of the trials in ``refit_packs``."""
        return [name for pack in self.refit_packs for name in pack]


def expand(
    study: Study, fingerprint: str, *, source: str, proposed: Sequence[Mapping[str, Sequence[Params]]] = ()
) -> tuple[Trial, ...]:
    """Return conditions x configurations x folds x replicates, in this order, without repeated trials of a condition.

    Configurations are those of the grid or of the first round, and those ``proposed`` for later rounds (condition ->
    configurations). Raises ``ConfigError`` for keys or values that no run accepts.
    """
    sweep = study.sweep
    conditions = sweep.conditions or {ONLY_CONDITION: {}}
    count = prod(map(len, sweep.grid.values())) if sweep.search is None else sweep.search.configurations
    _check(study, len(conditions) * count * sweep.folds * sweep.replicates, source)
    known, base = _known_configurations(sweep), to_tree(study.base())
    trials: dict[tuple[str, str], Trial] = {}
    for condition, settings in conditions.items():
        under = with_settings(base, settings, source=f"{source}: sweep.conditions.{condition}")
        later = [params for following in proposed for params in following[condition]]
        for number, params in enumerate([*known, *later][:count]):
            tree = with_settings(under, params, source=f"{source}: sweep.grid")
            location = f"{source}: sweep, condition {condition}, configuration {number} ({params})"
            for fold, replicate in product(range(sweep.folds), range(sweep.replicates)):
                run = build(Run, _with_fold_and_seed(tree, study, fold, replicate), source=location)
                name = trial_id(run, fingerprint)
                fold_or_none = fold if sweep.folds > 1 else None
                trial = Trial(name, condition, number, params, fold_or_none, replicate, run)
                trials.setdefault((condition, name), trial)
    return tuple(trials.values())


def _known_configurations(sweep: Sweep) -> list[Params]:
    """Return the configurations that depend on no result: the grid, or the first round."""
    search = sweep.search
    if search is None:
        return [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    count = search.round_size if isinstance(search, OptunaSearch) else search.configurations
    return [drawn(sweep.space, seed=search.seed, number=number) for number in range(count)]


def refit(trial: Trial, fingerprint: str, *, epochs: int) -> Trial:
    """Return the trial that trains a chosen configuration on all training rows, for a fixed number of epochs."""
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


def is_study(folder: Path) -> bool:
    """Return whether a study was started in a folder."""
    return (folder / FILE).is_file() and (folder / STUDY_FILE).is_file()


def save(path: Path, manifest: Manifest) -> None:
    """Write a manifest."""
    trials = [trial.as_tree() for trial in manifest.trials]
    write_json(path, {"version": VERSION, **vars(manifest), "trials": trials})


def load(path: Path) -> Manifest:
    """Read a manifest. Raises ``DataError`` if it is damaged."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(f"{path}: format version {content['version']}; this program reads version {VERSION}")
        trials = tuple(Trial.from_tree(tree, source=str(path)) for tree in content["trials"])
        packs, refit_packs = (tuple(tuple(pack) for pack in content[key]) for key in ("packs", "refit_packs"))
        return Manifest(content["study"], content["fingerprint"], trials, packs, refit_packs)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not the manifest of a study ({type(error).__name__})") from None


def _with_fold_and_seed(tree: Tree, study: Study, fold: int, replicate: int) -> Tree:
    settings: Params = {"seed": study.seed + replicate}
    if study.sweep.folds > 1:
        settings |= {"data.split.folds": study.sweep.folds, "data.split.fold": fold}
    return with_settings(tree, settings, source="sweep")


def _check(study: Study, total: int, source: str) -> None:
    problems = []
    if total > MAX_TRIALS:
        problems.append(f"sweep: {total} trials exceed the maximum of {MAX_TRIALS}")
    sweep = study.sweep
    condition_keys = [key for settings in sweep.conditions.values() for key in settings]
    for section, keys in (("grid", sweep.grid), ("space", sweep.space), ("conditions", condition_keys)):
        fixed = FIXED if section == "conditions" else FIXED + FIXED_IN_CHOICE
        problems += [
            f"sweep.{section}: {key}: cannot be swept; it would make the trials incomparable"
            for key in keys
            if any(key == prefix or key.startswith(f"{prefix}.") for prefix in fixed)
        ]
    for section, keys in (("grid", sweep.grid), ("space", sweep.space)):
        overlap = sorted(set(condition_keys) & set(keys))
        problems += [f"sweep: {key} is set by both the {section} and a condition" for key in overlap]
    problems += [
        f"sweep.space: {key}: step must be a whole number (got {dimension.step:g})"
        for key, dimension in sweep.space.items()
        if dimension.step is not None and dimension.step % 1 and is_whole(key)
    ]
    problems += _pruning_mistakes(study)
    if study.sweep.folds == 1 and study.data.split.validation_fraction == 0:
        problems.append("data.split.validation_fraction: must be > 0 to select a configuration, or set sweep.folds")
    if study.data.split.folds is not None:
        problems.append("data.split.folds: not allowed in a study; set sweep.folds")
    if problems:
        raise ConfigError(problems, source=source)


def _pruning_mistakes(study: Study) -> list[str]:
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


def unique(trials: Iterable[Trial]) -> list[Trial]:
    """Return every trial once: the first of duplicates, at the position of the last."""
    return list({trial.id: trial for trial in reversed(list(trials))}.values())[::-1]
