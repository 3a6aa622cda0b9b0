"""Training as in `train`, and equal data for both sides. The only file that uses the package's training interfaces."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from modis_dist.config.run import Optim, Trainer
from modis_dist.distributed import ALONE, World
from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.loader import Loader
from modis_dist.train.loss_log import LossLog
from modis_dist.train.prepare import Prepared, Subset
from modis_dist.train.state import Setup, TrainState
from tools.bench.baseline import PlainBatch
from tools.bench.shapes import Case, Setting


class Training:
    """Training of a stack of replicates with its loss log, as a step of `train/loop.py`."""

    def __init__(
        self, setting: Setting, *, replicates: int = 1, world: World = ALONE, dtype: torch.dtype = torch.float32
    ) -> None:
        case = setting.case
        setup = Setup(Optim(batch_size=setting.batch), setting.device, dtype, world)
        self.state = TrainState.start(case.shape, range(replicates), setup)
        self.rules = Rules(autocast_dtype=setting.autocast_dtype)
        self.weights = _weights(setting, replicates=replicates, dtype=dtype)
        self.log = LossLog(list(case.shape.features), slots=replicates, window=Trainer().log_every, world=world)

    def learn(self, batch: Batch) -> tuple[Terms, Terms]:
        """Run both phases of a step."""
        state = self.state
        batch = replace(batch)  # a new object, as from a loader: a captured step copies it to its inputs
        state.set_rates(1.0)
        adversary = state.adversary.learn(batch, self.weights, self.rules)
        vae = state.vaes.learn(batch, self.weights, self.rules)
        state.updates += 1
        self.log.record(adversary, vae)
        if self.log.full():
            self.log.flush(update=state.updates)
        return adversary, vae

    def learn_uncaptured(self, batch: Batch) -> tuple[Terms, Terms]:
        """Run both phases without CUDA graph replay, whose operators a profiler cannot see."""
        for learner in (self.state.adversary, self.state.vaes):
            learner.invalidate_graph()
        return self.learn(batch)


def train_epoch(training: Training, loader: Loader) -> None:
    """Run every step of the next epoch and compute the means of its losses."""
    state = training.state
    for step in range(loader.steps):
        training.learn(loader.batch(epoch=state.epoch, step=step))
    training.log.flush(update=state.updates)
    training.log.means()
    state.epoch += 1


def endless_steps(training: Training, loader: Loader) -> Iterator[None]:
    """Run one step per iteration, epoch after epoch."""
    while True:
        for step in range(loader.steps):
            training.learn(loader.batch(epoch=training.state.epoch, step=step))
            yield
        training.state.epoch += 1


def _weights(setting: Setting, *, replicates: int, dtype: torch.dtype) -> Weights:
    """Return the published weights: 1 except for the KL divergence and the penalty."""
    ones = torch.ones(replicates, dtype=dtype, device=setting.device)
    classes = setting.case.shape.classes
    return Weights(
        beta=setting.case.beta * ones,
        adversarial=ones,
        penalty_weight=setting.case.penalty_weight * ones,
        classification=ones,
        clustering=ones,
        pseudo_label_threshold=ones,
        prior=(ones / classes).unsqueeze(1).expand(-1, classes).contiguous(),
        losses=(setting.loss,) * replicates,
    )


def random_batch(
    setting: Setting, *, replicates: int = 1, world: World = ALONE, dtype: torch.dtype = torch.float32
) -> Batch:
    """Return this rank's rows of a batch of normal numbers, some of them unlabelled."""
    shape, drawing = setting.case.shape, torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=drawing, dtype=dtype)
    size = (replicates, len(shape.features), setting.batch)
    whole = [normal(replicates, setting.batch, p) for p in shape.features.values()]
    local = [part[:, world.block(m, setting.batch)] for m, part in enumerate(whole)]
    label = torch.randint(-1, shape.classes, size, generator=drawing)
    noise_d, noise_g = (normal(*size, shape.latent).to(setting.device) for _ in "dg")
    sample = torch.arange(setting.batch).expand(size).contiguous()
    x = tuple(part.to(setting.device) for part in local)
    return Batch(x, label.to(setting.device), sample.to(setting.device), noise_d, noise_g)


def plain_batch(batch: Batch) -> PlainBatch:
    """Return the rows, labels and noise of the first replicate for the baseline."""
    return PlainBatch([x[0] for x in batch.x], list(batch.label[0]), list(batch.noise_d[0]), list(batch.noise_g[0]))


def plain_terms(adversary: Terms, vae: Terms, case: Case) -> dict[str, float]:
    """Return the terms of the first replicate under the names of the baseline, one for each modality."""
    terms = {}
    for name, value in (adversary.parts | vae.parts).items():
        if value.dim() == 1:
            terms[name] = value[0].item()
        else:
            terms |= {f"{name}/{m}": part.item() for m, part in zip(case.shape.features, value[0], strict=True)}
    return terms


def random_rows(case: Case, *, limit: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return normal features and random labels of each modality: all training rows of the case, or ``limit``."""
    drawing = torch.Generator().manual_seed(0)
    values = {}
    for modality, p in case.shape.features.items():
        rows = min(case.rows[modality], limit or case.rows[modality])
        label = torch.randint(-1, case.shape.classes, (rows,), generator=drawing)
        values[modality] = torch.randn(rows, p, generator=drawing), label
    return values


def loader(setting: Setting, rows: dict[str, tuple[Tensor, Tensor]], *, replicates: int = 1) -> Loader:
    """Return the package's loader of these rows, shared by replicates, without oversampling of labelled rows."""
    return Loader(
        [_prepared(setting.case, rows)] * replicates,
        range(replicates),
        batch_size=setting.batch,
        epoch_length="shortest",
        min_labelled_fraction=0.0,
        latent=setting.case.shape.latent,
        signs=False,
        device=setting.device,
        dtype=torch.float32,
    )


def _prepared(case: Case, rows: dict[str, tuple[Tensor, Tensor]]) -> Prepared:
    """Return the rows as a training receives them."""
    x = {modality: features.numpy() for modality, (features, _) in rows.items()}
    label = {modality: labels.numpy() for modality, (_, labels) in rows.items()}
    names = {modality: np.arange(len(part)).astype(str).astype(object) for modality, part in x.items()}
    classes = tuple(str(number) for number in range(case.shape.classes))
    return Prepared(classes, {}, Subset(x, label, names), None, None, ())
