"""One run by itself: training it into a folder, and judging a trained folder on the rows of a store."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.parse import load_run
from modis_dist.config.run import Run
from modis_dist.data.store.arrays import FeatureStorage, RowView
from modis_dist.data.store.index import UNLABELLED, Index, Rows
from modis_dist.data.store.open_store import open_store
from modis_dist.data.store.reader import Store
from modis_dist.data.store.stored_rows import StoredRows
from modis_dist.evaluate.evaluation import Baselines, Probe, evaluate, evaluate_training, plain_baseline
from modis_dist.evaluate.predictor import Predictor
from modis_dist.evaluate.results import Result, StoreEvaluation, read_result, write_result, write_run
from modis_dist.execution.resource_errors import enough_memory, sound_disk
from modis_dist.execution.run_pack import chosen_device
from modis_dist.execution.trial import trial_id
from modis_dist.report.trial import draw
from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.runtime.lock import PATIENCE_S, locked
from modis_dist.train import checkpoint, cpu_settings
from modis_dist.train.callbacks import Reporter, Stop
from modis_dist.train.journal import JournalWriter
from modis_dist.train.loop import Ports, fit
from modis_dist.train.placement import storage_of
from modis_dist.train.prepare import Subset, data_key, load_cohort, prepare, select, shape, training_rows
from modis_dist.train.process_group import ALONE, RankSpec, join_process_group
from modis_dist.train.seeds import mix
from modis_dist.train.stack import Member


def train_run(
    run: Run, *, out: Path, source: str, reporter: Reporter, stop: Stop, seat: RankSpec = ALONE
) -> Result | None:
    """Train a run into ``out``, or continue it there; returns its result.

    Of several ranks all call this; the first writes and judges, and the others return None.

    Raises ``RunFailed`` where the training diverged, the disk refuses or memory is out, ``Interrupted`` where it was
    asked to stop, ``DataError`` where ``out`` belongs to another run.
    """
    device = chosen_device(run)
    store = open_store(run.data, out=out, source=source)
    trial = trial_id(run, store.fingerprint)
    earlier = read_result(out)
    if earlier is not None and earlier["trial"] != trial:
        raise DataError(f"{out}: holds another run (settings or data differ); use another --out")
    if earlier is not None and earlier["status"] == "done":
        return earlier
    if any((out / name).exists() for name in ("manifest.json", "study.yaml")):
        raise DataError(f"{out}: holds a store or a study; use another --out")
    with enough_memory(out, run):
        prepared = prepare(run, load_cohort(store, run.data, place=storage_of(run, store)))
    shape(run, {m: len(p.features_out) for m, p in prepared.pipelines.items()}, len(prepared.classes))  # or it refuses
    member = Member(trial, run, prepared, out)
    cpu_settings.use(run.trainer.threads)
    with enough_memory(out, run), sound_disk(out), ExitStack() as held:
        with join_process_group(seat, device=device) as world:
            # Ranks that start again may find the one that was killed not gone yet.
            patience_s = PATIENCE_S if seat.size > 1 else 0
            journal = world.first(lambda: held.enter_context(_begun(out, run, patience_s=patience_s)))
            ports = Ports(journal, reporter, stop) if journal else Ports(stop=stop)
            (progress,) = fit([member], folder=out, device=device, ports=ports, world=world)
        if journal is None:
            return None
        result = evaluate_training(
            member, progress, evaluated_on="validation", probe=True, baselines=Baselines(), device=device
        )
        draw(member, result)
        journal.event(trial, kind="end", values={"status": progress.status, "epochs": progress.epochs})
        write_result(out, result)
    if progress.status == "failed":
        raise RunFailed(f"{out}: {progress.reason}; {_last_good(out)}")
    return result


@contextmanager
def _begun(out: Path, run: Run, *, patience_s: float) -> Iterator[JournalWriter]:
    """The journal of a training whose folder is locked."""
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out, patience_s=patience_s):
        write_run(out, run)
        with JournalWriter(out / "journal.jsonl") as journal:
            yield journal


def _last_good(out: Path) -> str:
    found = checkpoint.newest(out / "last")
    kept = f"the last good checkpoint is {found}" if found else "no checkpoint had been written yet"
    return f"{kept}; lower optim.lr or check the values of that modality, and use another --out"


def evaluate_folder(folder: Path, store: Path) -> StoreEvaluation:
    """Judge the model of a folder on a store.

    On the store it was trained with: on the test rows of its split, or the validation rows where there are none, with
    the baseline and the alignment probe. On any other store: on all rows of classes that the model knows, without
    those that have the sample or group id of a training row where the training's own store is still at hand.
    """
    predictor, opened = Predictor.open(folder), Store.open(store)
    run = load_run(_run_file(predictor.path))
    place = storage_of(run, opened)
    if data_key(run, opened.fingerprint) != predictor.data:
        return _judged_elsewhere(predictor, opened, learnt_from(run, predictor), place=place)
    prepared = prepare(run, load_cohort(opened, run.data, place=place), test=True)
    subset_or_none = prepared.test or prepared.validation
    if subset_or_none is None:
        raise DataError(f"{folder}: the run has neither test nor validation rows; see data.split")
    probing = Probe(prepared.train, mix(run.seed, "probe"))
    return {
        "rows": "test" if prepared.test else "validation",
        "left_out": 0,
        "training_rows_left_out": sum(prepared.train.rows().values()),
        "evaluation": evaluate(predictor, subset_or_none, absent_pairs=prepared.absent_pairs, probing=probing),
        "baseline": plain_baseline(prepared, subset_or_none),
    }


def _run_file(path: Path) -> Path:
    """The ``run.yaml`` that belongs to ``best/step-*``."""
    file = path.parent.parent / "run.yaml"
    if not file.exists():
        raise DataError(f"{file}: is missing; the settings of the model are needed to judge it")
    return file


@dataclass(frozen=True)
class Learnt:
    """Ids of the rows a model was trained on, of all modalities together."""

    samples: frozenset[str]
    groups: frozenset[str]

    def knows(self, index: Index) -> NDArray[np.bool_]:
        """Which rows are of a known sample or group; shape [n]."""
        pairs = zip(index.sample_id, index.group_id, strict=True)
        return np.array([sample in self.samples or group in self.groups for sample, group in pairs], dtype=bool)


def learnt_from(run: Run, predictor: Predictor) -> Learnt | None:
    """The training rows of a model, from the store it was trained with; None where that is not at hand unchanged.

    Nothing of a patient is kept with a model, so there is no other place to look.
    """
    folder = _run_file(predictor.path).parent
    # a simulated store lies in the folder of its run or of its study (study/trials/ID, study/model)
    places = [folder, folder.parent, folder.parent.parent]
    named = [Path(run.data.store)] if run.data.store else [s for p in places for s in sorted(p.glob("store-*"))]
    for path in named:
        try:
            store = Store.open(path)
        except (DataError, OSError):
            continue
        if data_key(run, store.fingerprint) == predictor.data:
            selection = select(store, run.data)
            _, chosen = training_rows(run, selection)
            parts = [selection.index[m].take(chosen[m].rows) for m in selection.modalities]
            return Learnt(
                frozenset(name for part in parts for name in part.sample_id),
                frozenset(name for part in parts for name in part.group_id),
            )
    return None


def _judged_elsewhere(
    predictor: Predictor, store: Store, learnt: Learnt | None, *, place: FeatureStorage
) -> StoreEvaluation:
    """Metrics on a store that the model was not trained with."""
    subset, unknown, known = _new_rows(predictor, store, learnt, place=place)
    if not any(subset.rows().values()):
        raise DataError(
            f"{store.path}: no row is left to judge ({unknown} of classes that the model does not know, {known} with "
            "the sample or group id of a training row)"
        )
    return {
        "rows": "all",
        "left_out": unknown,
        "training_rows_left_out": None if learnt is None else known,
        "evaluation": evaluate(predictor, subset),
        "baseline": None,
    }


def _new_rows(
    predictor: Predictor, store: Store, learnt: Learnt | None, *, place: FeatureStorage
) -> tuple[Subset, int, int]:
    """The store's rows of known classes that were not learnt from, preprocessed as in training.

    Also the numbers of rows left out: of unknown classes, and of the others those learnt from.
    """
    modalities = [m for m in store.modalities if m in predictor.modalities]
    if not modalities:
        raise DataError(f"{store.path}: has none of the model's modalities ({', '.join(predictor.modalities)})")
    unknown = -2
    codes = [predictor.classes.index(c) if c in predictor.classes else unknown for c in store.classes]
    code = np.array([*codes, UNLABELLED])
    whole, strangers, learnt_rows = Subset({}, {}, {}), 0, 0
    for modality in modalities:
        index = store.index(modality)
        label = code[index.label]
        strange = label == unknown
        trained_on = np.zeros(len(index), dtype=bool) if learnt is None else learnt.knows(index) & ~strange
        strangers, learnt_rows = strangers + int(strange.sum()), learnt_rows + int(trained_on.sum())
        kept = np.flatnonzero(~strange & ~trained_on)
        x = predictor.transform(_aligned(predictor, store, modality, kept), modality=modality, place=place)
        whole = replace(
            whole,
            x={**whole.x, modality: x},
            label={**whole.label, modality: label[kept]},
            sample_id={**whole.sample_id, modality: index.sample_id[kept]},
        )
    return whole, strangers, learnt_rows


def _aligned(predictor: Predictor, store: Store, modality: str, rows: Rows) -> RowView:
    """Rows of a store with the model's features, in the model's order. Raises ``DataError`` naming missing ones."""
    position = {name: place for place, name in enumerate(store.features(modality))}
    wanted = predictor.features(modality)
    missing = [name for name in wanted if name not in position]
    if missing:
        raise DataError(
            f"{store.path}: modality {modality} lacks {len(missing)} of the model's features ({', '.join(missing[:5])})"
        )
    columns = np.array([position[name] for name in wanted])
    same = len(columns) == len(position) and (columns == np.arange(len(columns))).all()
    return RowView(StoredRows(store, modality), rows, None if same else columns)
