"""One run by itself: training it into a folder, and judging a trained folder on the rows of a store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modis_dist.config.parse import load_run
from modis_dist.config.run import Run
from modis_dist.data.index import UNLABELLED
from modis_dist.data.opening import open_store
from modis_dist.data.store import Store
from modis_dist.errors import DataError, RunFailed
from modis_dist.report.trial import draw
from modis_dist.sweep.execute import chosen_device, locked
from modis_dist.sweep.manifest import trial_id
from modis_dist.train import checkpoint
from modis_dist.train.evaluate import Probe, evaluate, plain_baseline
from modis_dist.train.journal import JournalWriter
from modis_dist.train.loop import Member, Ports, fit
from modis_dist.train.outcome import Baselines, conclude, read_result, write_run
from modis_dist.train.ports import Reporter, Stop
from modis_dist.train.predictor import Predictor
from modis_dist.train.prepare import Subset, load_cohort, prepare
from modis_dist.train.seeds import mix


def train_run(run: Run, *, out: Path, source: str, reporter: Reporter, stop: Stop) -> dict[str, Any]:
    """Train a run into ``out``, or continue it there; returns its result.

    Raises ``RunFailed`` where the training diverged, ``Interrupted`` where it was asked to stop, ``DataError`` where
    ``out`` belongs to another run.
    """
    device = chosen_device(run)
    store = open_store(run.data, out=out, source=source)
    cohort = load_cohort(store, run.data)
    trial = trial_id(run, store.fingerprint)
    earlier = read_result(out)
    if earlier is not None and earlier["trial"] != trial:
        raise DataError(f"{out}: holds another run (settings or data differ); use another --out")
    if earlier is not None and earlier["status"] == "done":
        return earlier
    member = Member(trial, run, prepare(run, cohort), out)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out, patience_s=0):
        write_run(out, run)
        if run.trainer.threads is not None:
            torch.set_num_threads(run.trainer.threads)
        journal = JournalWriter(out / "journal.jsonl")
        try:
            (progress,) = fit([member], folder=out, device=device, ports=Ports(journal, reporter, stop))
            result = conclude(member, progress, judged_on="validation", probe=True, baselines=Baselines())
            journal.event(trial, kind="end", values={"status": progress.status, "epochs": progress.epochs})
        finally:
            journal.close()
        if progress.status == "failed":
            raise RunFailed(f"{out}: {progress.reason}; {_last_good(out)}")
        draw(member, result)
    return result


def _last_good(out: Path) -> str:
    found = checkpoint.newest(out / "last")
    kept = f"the last good checkpoint is {found}" if found else "no checkpoint had been written yet"
    return f"{kept}; lower optim.lr or check the values of that modality, and use another --out"


def evaluate_folder(folder: Path, store: Path) -> dict[str, Any]:
    """Judge the model of a folder on a store.

    On the store it was trained with: on the test rows of its split, or the validation rows where there are none, with
    the baseline and the alignment probe. On any other store: on all rows of classes that the model knows.

    Keys: ``rows`` ("test", "validation" or "all"), ``left_out`` (rows of unknown classes), ``evaluation``,
    ``baseline`` (or None).
    """
    predictor, opened = Predictor.open(folder), Store.open(store)
    run = load_run(_run_file(predictor.path))
    if trial_id(run, opened.fingerprint) != predictor.trial:
        subset, left_out = _all_rows(predictor, opened)
        return {"rows": "all", "left_out": left_out, "evaluation": evaluate(predictor, subset), "baseline": None}
    prepared = prepare(run, load_cohort(opened, run.data), test=True)
    subset_or_none = prepared.test or prepared.validation
    if subset_or_none is None:
        raise DataError(f"{folder}: the run has neither test nor validation rows; see data.split")
    probing = Probe(prepared.train, mix(run.seed, "probe"))
    return {
        "rows": "test" if prepared.test else "validation",
        "left_out": 0,
        "evaluation": evaluate(predictor, subset_or_none, absent_pairs=prepared.absent_pairs, probing=probing),
        "baseline": plain_baseline(prepared, subset_or_none),
    }


def _run_file(path: Path) -> Path:
    """The ``run.yaml`` that belongs to ``best/step-*``."""
    file = path.parent.parent / "run.yaml"
    if not file.exists():
        raise DataError(f"{file}: is missing; the settings of the model are needed to judge it")
    return file


def _all_rows(predictor: Predictor, store: Store) -> tuple[Subset, int]:
    """Every row of the store whose class the model knows, preprocessed as in training, and the number of others."""
    modalities = [m for m in store.modalities if m in predictor.modalities]
    if not modalities:
        raise DataError(f"{store.path}: has none of the model's modalities ({', '.join(predictor.modalities)})")
    unknown = -2
    codes = [predictor.classes.index(c) if c in predictor.classes else unknown for c in store.classes]
    code = np.array([*codes, UNLABELLED])
    whole, left_out = Subset({}, {}, {}), 0
    for modality in modalities:
        index = store.index(modality)
        label = code[index.label]
        kept = np.flatnonzero(label != unknown)
        left_out += len(index) - len(kept)
        x = predictor.transform(_aligned(predictor, store, modality, kept), modality=modality)
        whole = replace(
            whole,
            x={**whole.x, modality: x},
            label={**whole.label, modality: label[kept]},
            sample_id={**whole.sample_id, modality: index.sample_id[kept]},
        )
    return whole, left_out


def _aligned(predictor: Predictor, store: Store, modality: str, rows: Any) -> Any:
    """Rows of a store with the model's features, in the model's order. Raises ``DataError`` naming missing ones."""
    position = {name: place for place, name in enumerate(store.features(modality))}
    wanted = predictor.features(modality)
    missing = [name for name in wanted if name not in position]
    if missing:
        raise DataError(
            f"{store.path}: modality {modality} lacks {len(missing)} of the model's features ({', '.join(missing[:5])})"
        )
    x = store.read(modality, rows)
    columns = [position[name] for name in wanted]
    return x if columns == list(range(x.shape[1])) else np.ascontiguousarray(x[:, columns])
