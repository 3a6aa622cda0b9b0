"""Systems to measure: those of the paper, a tiny one, and systems of any size; settings of a measurement.

Sizes and weights are those of the paper's tables S1 to S3. Independent of how a step is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from modis_dist.model.networks import Shape, widths

Loss = Literal["published", "pairwise"]
Precision = Literal["fp32", "bf16"]

INTERSIM_RATIOS = (1.2, 1.0, 0.75, 0.5, 0.25)
AUTOCAST_DTYPES: Mapping[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A system, its training rows by modality, and the weights of its losses."""

    shape: Shape
    rows: Mapping[str, int]
    beta: float
    penalty_weight: float


@dataclass(frozen=True)
class Setting:
    """One row of a table: the system that is trained, and how."""

    name: str
    case: Case
    batch: int  # rows of each modality
    precision: Precision
    threads: int
    device: torch.device
    loss: Loss

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Return the autocast dtype; None for float32."""
        return AUTOCAST_DTYPES[self.precision]

    def columns(self) -> dict[str, Any]:
        """Return the columns that identify this row."""
        return {"shape": self.name, "batch": self.batch, "precision": self.precision, "threads": self.threads}


def case(
    nets: Mapping[str, tuple[int, Sequence[float]]],
    *,
    latent: int,
    classes: int,
    rows: Sequence[int],
    beta: float,
    penalty_weight: float,
    discriminator: tuple[int, ...] = (1024, 512, 256),
) -> Case:
    """Return a case from the features and width ratios of each modality."""
    features = {modality: p for modality, (p, _) in nets.items()}
    hidden = {modality: widths(p, ratios) for modality, (p, ratios) in nets.items()}
    shape = Shape(features, hidden, latent, classes, discriminator)
    return Case(shape, dict(zip(nets, rows, strict=True)), beta, penalty_weight)


def of_size(*, modalities: int, features: int, latent: int) -> Case:
    """Return a case of any size: equal modalities, with InterSIM's ratios, classes and weights."""
    nets = {f"m{number}": (features, INTERSIM_RATIOS) for number in range(modalities)}
    return case(nets, latent=latent, classes=5, rows=[1000] * modalities, beta=1e-4, penalty_weight=10.0)


CASES: Mapping[str, Case] = {
    # 80 % of 11,500 samples, each of which keeps one modality.
    "intersim": case(
        {"methylation": (367, INTERSIM_RATIOS), "rna": (131, INTERSIM_RATIOS), "protein": (160, INTERSIM_RATIOS)},
        latent=64,
        classes=5,
        rows=(3067, 3067, 3066),
        beta=1e-4,
        penalty_weight=10.0,
    ),
    # Rows: sums of the first ten lines of table S1.
    "tcga10": case(
        {
            "methylation": (2500, (1.2, 0.8, 0.6, 0.4, 0.2)),
            "rna": (2500, (1.2, 0.8, 0.6, 0.5)),
            "mirna": (542, (1.2, 1.0)),
        },
        latent=512,
        classes=10,
        rows=(4199, 4738, 4631),
        beta=1e-6,
        penalty_weight=160.0,
    ),
    "tiny": case(
        {"a": (20, (1.2, 0.5)), "b": (12, (1.2, 0.5)), "c": (16, (1.0,))},
        latent=8,
        classes=3,
        rows=(70, 80, 64),
        beta=1e-4,
        penalty_weight=10.0,
        discriminator=(32, 16, 8),
    ),
}
