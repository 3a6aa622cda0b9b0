"""The plan of a study on its data: trials, packs and network sizes. Trains nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modis_dist.config.parse import digest, to_tree
from modis_dist.config.study import Study
from modis_dist.data.open_store import open_store
from modis_dist.data.store.reader import Store
from modis_dist.evaluate.results import read_result
from modis_dist.execution.memory import model_bytes
from modis_dist.execution.run_pack import Pack, chosen_device, cohort_of, trial_folder
from modis_dist.execution.trial import Trial
from modis_dist.model.networks import Shape
from modis_dist.study import manifest
from modis_dist.study.manifest import Manifest, unique
from modis_dist.study.packs import arrange_packs, pack_size_limit
from modis_dist.study.search_state import SearchState
from modis_dist.train.prepare import PreparationEstimate, SelectionOf, estimate_preparation, selections, shape


@dataclass(frozen=True)
class Plan:
    """A study on its data, before anything is trained."""

    study: Study
    store: Store
    selection_of: SelectionOf
    manifest: Manifest
    shapes: Mapping[str, Shape]  # by trial id
    data: Mapping[str, PreparationEstimate]  # by trial id
    outdated: frozenset[str]  # trials of an earlier start that are no longer part of the study
    remaining_rounds: float  # those whose configurations depend on results
    on_gpu: bool  # true if trained on a GPU

    def packs(self) -> list[Pack]:
        """Return the packs of the search."""
        trials = {trial.id: trial for trial in self.manifest.trials}
        probe = self.study.sweep.probe
        return [Pack(tuple(trials[name] for name in pack), probe=probe) for pack in self.manifest.packs]

    def max_pack_size(self, trial: Trial) -> int:
        """Return the maximum number of trials in a pack, for trials like this one."""
        return _max_pack_size(self.study, trial, self.data[self.similar(trial)], on_gpu=self.on_gpu)

    def similar(self, trial: Trial) -> str:
        """Return the id of a trial with data of the same size in the manifest, which has no refits."""
        of_condition = (other.id for other in self.manifest.trials if other.condition == trial.condition)
        return trial.id if trial.id in self.data else next(of_condition)


def plan(study: Study, *, out: Path, slots: int, source: str, gpu: bool | None = None) -> Plan:
    """Plan the trials and packs of a study; packs of an earlier start in ``out`` stay as they are.

    ``gpu``: whether the machines that train the study have GPUs; None if this machine trains it. Raises ``ConfigError``
    or ``DataError`` for all invalid settings and unsuitable data, before anything is trained.
    """
    if study.data.simulate is not None:
        manifest.expand(study, "", source=source)  # raises for a mistake in the sweep before data are simulated
    on_gpu = chosen_device(study).type == "cuda" if gpu is None else gpu and study.trainer.device != "cpu"
    store = open_store(study.data, out=out, source=source)
    selection_of = selections(store)
    search = None if study.sweep.search is None else SearchState(study, store.fingerprint, out=out, source=source)
    trials = search.trials if search else manifest.expand(study, store.fingerprint, source=source)
    data = _preparations(trials, store)
    shapes = {trial.id: shape(trial.run, data[trial.id].features, data[trial.id].classes) for trial in trials}
    path = out / manifest.FILE
    earlier = manifest.load(path) if path.exists() else Manifest(study.name, "", (), (), ())
    packs = arrange_packs(
        unique(trials),
        selection_of,
        earlier=earlier.packs,
        done=partial(is_done, out),
        max_pack_size=lambda trial: _max_pack_size(study, trial, data[trial.id], on_gpu=on_gpu),
        slots=slots,
    )
    planned = Manifest(study.name, store.fingerprint, trials, ids_of(packs), earlier.refit_packs)
    outdated = frozenset(trial.id for trial in earlier.trials) - {trial.id for trial in trials}
    remaining_rounds = search.remaining_rounds if search else 0.0
    return Plan(study, store, selection_of, planned, shapes, data, outdated, remaining_rounds, on_gpu)


def _max_pack_size(study: Study, trial: Trial, data: PreparationEstimate, *, on_gpu: bool) -> int:
    each = model_bytes(shape(trial.run, data.features, data.classes), slots=1)
    return pack_size_limit(study.sweep.packing, each, on_gpu=on_gpu)


def is_done(out: Path, trial: Trial) -> bool:
    """Return whether a trial has its result."""
    return read_result(trial_folder(out, trial)) is not None


def ids_of(packs: Sequence[Sequence[Trial]]) -> tuple[tuple[str, ...], ...]:
    """Return the trial ids of packs, as a manifest lists them."""
    return tuple(tuple(trial.id for trial in pack) for pack in packs)


def _preparations(trials: Sequence[Trial], store: Store) -> dict[str, PreparationEstimate]:
    """Return the sizes and the time of the preparation of every trial's data, by id.

    Data are prepared for the first trial of each kind, so that errors in them are raised before anything starts; only
    the trainings compute principal components.
    """
    known: dict[str, PreparationEstimate] = {}
    by_trial = {}
    for trial in trials:
        tree = to_tree(trial.run)
        tree["data"]["split"].pop("fold")
        likelihoods = {modality: net.likelihood for modality, net in trial.run.model.modalities.items()}
        key = digest([tree["data"], tree["preprocess"], tree["scenario"], likelihoods])
        if key not in known:
            known[key] = estimate_preparation(trial.run, cohort_of(store.path, trial.run))
        by_trial[trial.id] = known[key]
    return by_trial
