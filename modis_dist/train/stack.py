"""The members of a stack: their runs and data, loss weights, and best models."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modis_dist.config.run import Run
from modis_dist.data.store.arrays import slices
from modis_dist.model.networks import Modis, Shape
from modis_dist.objective import Rules, Weights
from modis_dist.train.checkpoint import Checkpoint
from modis_dist.train.prepare import Prepared
from modis_dist.train.progress import Progress

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Member:
    """One training of a stack: its trial, run, data, and the folder of its best model."""

    trial: str
    run: Run
    prepared: Prepared
    folder: Path


def best_model(
    member: Member, progress: Progress, tensors: Mapping[str, Tensor], *, shape: Shape, steps: int
) -> Checkpoint:
    """Return a member's best model (the last without validation) and all that prediction needs; ``steps`` per epoch."""
    arrays: dict[str, Tensor] = {}
    description: dict[str, object] = {}
    for modality, pipeline in member.prepared.pipelines.items():
        parts, description[modality] = pipeline.to_arrays()
        arrays |= {f"{modality}/{name}": torch.as_tensor(array) for name, array in parts.items()}
    epoch = progress.best_epoch or progress.epochs
    values = {
        "trial": member.trial,
        "data": member.prepared.key,
        "epoch": epoch,
        "metric": member.run.trainer.metric,
        "value": progress.best_value,
        "shape": asdict(shape),
        "classes": list(member.prepared.classes),
        "absent_pairs": [list(pair) for pair in member.prepared.absent_pairs],
        "preprocess": description,
    }
    return Checkpoint(epoch * steps, {"model": dict(tensors), "preprocess": arrays}, values)


def set_library_sizes(model: Modis, members: Sequence[Member]) -> None:
    """Set each member's library size for predicted counts to that of its median training row."""
    for modality in model.modalities:
        vae = model.vae(modality)
        if vae.counts:
            for slot, member in enumerate(members):
                x = member.prepared.train.x[modality]
                totals = [np.expm1(x[rows]).sum(1) for rows in slices(len(x), x.shape[1])]
                vae.library[slot] = float(np.median(np.concatenate(totals)))


def stack_weights(members: Sequence[Member], *, device: torch.device, dtype: torch.dtype) -> Weights:
    """Return the loss weights of all members, stacked."""
    priors = []
    for member in members:
        classes = len(member.prepared.classes)
        shares = torch.as_tensor(member.prepared.class_shares())
        empirical = member.run.objective.class_prior == "empirical" and shares.sum() > 0
        priors.append(shares if empirical else torch.full((classes,), 1 / classes, dtype=torch.float64))
    return weights([member.run for member in members], torch.stack(priors).to(device, dtype))


def weights(runs: Sequence[Run], prior: Tensor) -> Weights:
    """Return the loss weights of a stack of runs, given the class ``prior`` [r, k], which sets device and dtype."""

    def column(name: str) -> Tensor:
        return prior.new_tensor([getattr(run.objective, name) for run in runs])

    return Weights(
        beta=column("beta"),
        adversarial=column("adversarial_weight"),
        penalty_weight=column("penalty_weight"),
        classification=column("classification_weight"),
        clustering=column("clustering_weight"),
        pseudo_label_threshold=column("pseudo_label_threshold"),
        prior=prior,
        losses=tuple(run.objective.adversarial_loss for run in runs),
    )


def rules(run: Run) -> Rules:
    """Return the settings of the objective that all runs of a stack share."""
    objective, autocast_dtype = run.objective, AUTOCAST_DTYPES[run.trainer.precision]
    return Rules(objective.kl_reduction, objective.penalty_outputs, objective.penalty_inputs, autocast_dtype)
