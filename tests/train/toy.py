"""A small cohort in memory: three modalities with class structure, partly unpaired, some rows unlabelled."""

from pathlib import Path

import numpy as np
import torch

from modis_dist.config import parse
from modis_dist.config.run import Run
from modis_dist.data.store.index import Index
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.loop import fit
from modis_dist.train.prepare import Cohort, Prepared, Selection, prepare
from modis_dist.train.progress import Progress
from modis_dist.train.stack import Member

CLASSES = ("a", "b", "c")
SIZES = {"mirna": 12, "cnv": 9, "rppa": 7}
CPU = torch.device("cpu")
TREE = {
    "name": "toy",
    "data": {"split": {"test_fraction": 0.2, "validation_fraction": 0.2}},
    "model": {"latent": 4, "ratios": [1.0, 0.5], "discriminator": [16, 8]},
    "optim": {"lr": 1e-3, "epochs": 4, "batch_size": 8},
    "trainer": {"log_every": 3, "checkpoint_every": 1, "threads": 1},
}


def cohort(*, samples: int = 90, seed: int = 0) -> Cohort:
    """Return samples with class-dependent means; every third lacks the last modality."""
    rng = np.random.default_rng(seed)
    label = np.arange(samples) % len(CLASSES)
    index, x = {}, {}
    for number, (modality, features) in enumerate(SIZES.items()):
        has = np.arange(samples) % 3 != 2 if number == 2 else np.ones(samples, bool)
        means = rng.normal(size=(len(CLASSES), features)) * 1.5
        values = means[label] + rng.normal(size=(samples, features))
        ids = np.array([f"s{i}" for i in range(samples)], object)[has]
        known = np.where(rng.random(samples) < 0.9, label, -1)[has]
        index[modality] = Index(ids, ids, known.astype(np.int64), np.full(len(ids), "", object))
        x[modality] = values[has].astype(np.float32)
    rows = {m: np.arange(len(i)) for m, i in index.items()}
    features_of = {m: tuple(f"{m}{j}" for j in range(p)) for m, p in SIZES.items()}
    return Cohort(Selection("toy", CLASSES, index, rows), features_of, x)


def run(*overrides: str, **top: object) -> Run:
    """Return the toy run with overrides."""
    return parse.build(Run, parse.with_overrides(TREE | top, overrides), source="toy")


def member(name: str, settings: Run, folder: Path, *, prepared: Prepared | None = None) -> Member:
    """Return a member with its own folder."""
    return Member(name, settings, prepared or prepare(settings, cohort(), test=True), folder / name)


def train(members: list[Member], folder: Path, *, callbacks: Callbacks | None = None) -> list[Progress]:
    """Run ``fit`` on the CPU with one thread."""
    torch.set_num_threads(1)
    return fit(members, folder=folder, device=CPU, callbacks=callbacks)
