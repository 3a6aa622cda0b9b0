"""What a study comes to on its data: its trials, its packs and the sizes of its networks. Trains nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modis_dist.config import parse
from modis_dist.config.parse import to_tree
from modis_dist.config.study import Study
from modis_dist.data.store.open_store import open_store
from modis_dist.data.store.reader import Store
from modis_dist.evaluate.results import read_result
from modis_dist.execution.memory import model_bytes
from modis_dist.execution.run_pack import Pack, chosen_device, cohort_of, trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.model.networks import Shape
from modis_dist.study import manifest
from modis_dist.study.manifest import Manifest, unique
from modis_dist.study.packs import in_one_pack, layout
from modis_dist.study.search.rounds import Search
from modis_dist.train.prepare import PreparationEstimate, SelectionOf, estimate_preparation, selections, shape


@dataclass(frozen=True)
class Plan:
    """What a study comes to on its data, before anything is trained."""

    study: Study
    store: Store
    selection_of: SelectionOf
    manifest: Manifest
    shapes: Mapping[str, Shape]  # by trial id
    data: Mapping[str, PreparationEstimate]  # what preparing it comes to, by trial id
    outdated: frozenset[str]  # trials of an earlier start that are not part of the study any more
    to_come: float  # rounds whose configurations depend on results
    on_gpu: bool  # where it is trained

    def packs(self) -> list[Pack]:
        """The packs of the search."""
        trials = {trial.id: trial for trial in self.manifest.trials}
        probe = self.study.sweep.probe
        return [Pack(tuple(trials[name] for name in pack), probe=probe) for pack in self.manifest.packs]

    def most(self, trial: Trial) -> int:
        """How many trials like this one may be in one pack; unlisted, it has data like its condition's."""
        alike = (listed.id for listed in self.manifest.trials if listed.condition == trial.condition)
        near = self.data[trial.id if trial.id in self.data else next(alike)]
        return _most(self.study, trial, near, on_gpu=self.on_gpu)


def plan(study: Study, *, out: Path, slots: int, source: str, gpu: bool | None = None) -> Plan:
    """The trials and packs of a study; packs of an earlier start in ``out`` stay as they are.

    ``gpu``: whether the other machines that it is trained on have GPUs, which this one need not have; None where it is
    trained here. Raises ``ConfigError`` or ``DataError`` for whatever the settings or the data refuse, before anything
    is trained.
    """
    if study.data.simulate is not None:
        manifest.expand(study, "", source=source)  # a mistake in the sweep is said before anything is simulated
    on_gpu = chosen_device(study).type == "cuda" if gpu is None else gpu and study.trainer.device != "cpu"
    store = open_store(study.data, out=out, source=source)
    selection_of = selections(store)
    search = Search(study, store.fingerprint, out=out, source=source)
    trials = search.trials
    data = _kinds(trials, store)
    shapes = {trial.id: shape(trial.run, data[trial.id].features, data[trial.id].classes) for trial in trials}
    path = out / "manifest.json"
    earlier = manifest.load(path) if path.exists() else Manifest(study.name, "", (), (), ())
    packs = layout(
        unique(trials),
        selection_of,
        earlier=earlier.packs,
        done=partial(is_done, out),
        most=lambda trial: _most(study, trial, data[trial.id], on_gpu=on_gpu),
        slots=slots,
    )
    listed = Manifest(study.name, store.fingerprint, trials, ids_of(packs), earlier.refit_packs)
    outdated = frozenset(trial.id for trial in earlier.trials) - {trial.id for trial in trials}
    return Plan(study, store, selection_of, listed, shapes, data, outdated, search.to_come, on_gpu)


def _most(study: Study, trial: Trial, near: PreparationEstimate, *, on_gpu: bool) -> int:
    each = model_bytes(shape(trial.run, near.features, near.classes), replicates=1)
    return in_one_pack(study.sweep.packing, each, on_gpu=on_gpu)


def is_done(out: Path, trial: Trial) -> bool:
    return read_result(trial_folder(out, trial)) is not None


def ids_of(packs: Sequence[Sequence[Trial]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(trial.id for trial in pack) for pack in packs)


def _kinds(trials: Sequence[Trial], store: Store) -> dict[str, PreparationEstimate]:
    """What preparing the data of every trial comes to, by id.

    It is tried for the first trial of every kind of data, so that what the data refuse is said before anything starts;
    principal components are left to the trainings.
    """
    known: dict[str, PreparationEstimate] = {}
    found = {}
    for trial in trials:
        tree = to_tree(trial.run)
        tree["data"]["split"].pop("fold")
        key = parse.digest([tree["data"], tree["preprocess"], tree["scenario"]])
        if key not in known:
            known[key] = estimate_preparation(trial.run, cohort_of(store.path, trial.run))
        found[trial.id] = known[key]
    return found
