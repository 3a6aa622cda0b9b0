"""A toy system: modalities of 7, 5 and 6 features, with encoders of three, two and one layer."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

from modis_dist.config.run import Optim
from modis_dist.losses.table import ADVERSARIAL
from modis_dist.model.networks import Shape
from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.loader import EpochLength, Loader
from modis_dist.train.prepare import Prepared, Subset
from modis_dist.train.state import Setup, TrainState

Inputs = TypeVar("Inputs", Batch, Weights)
KINDS = tuple(ADVERSARIAL)
SHAPE = Shape(
    features={"a": 7, "b": 5, "c": 6},
    hidden={"a": (8, 6, 4), "b": (6, 5), "c": (5,)},
    latent=4,
    classes=3,
    discriminator=(9, 8, 6),
)
ROWS = 6
OPTIM = Optim(lr=1e-3, lr_discriminator=2e-3, batch_size=ROWS)
CPU = torch.device("cpu")
few = settings(max_examples=15, deadline=None, derandomize=True)


def normal(*size: int, seed: int = 0) -> Tensor:
    """Return standard normal float64 numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*size: int, seed: int = 0, classes: int = SHAPE.classes) -> Tensor:
    """Return class codes, about a quarter of them hidden (-1)."""
    drawn = torch.randint(0, 4 * classes, size, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 3 * classes, drawn % classes, -1)


def start(seeds: Sequence[int] = (0,), *, dtype: torch.dtype = torch.float64, optim: Optim = OPTIM) -> TrainState:
    """Return the state of a new toy training."""
    return TrainState.start(SHAPE, seeds, Setup(optim, CPU, dtype))


def samples(slots: int, rows: int, *, seed: int = 0) -> Tensor:
    """Return sample codes [r, 3, rows]; the modalities share most samples, in different order."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rows + 2, generator=generator)[:rows] for _ in range(3 * slots)]
    return torch.stack(orders).view(slots, 3, rows)


def batch(seed: int = 0, *, slots: int = 1, rows: int = ROWS, signs: bool = False) -> Batch:
    """Return a batch of random rows with class-dependent means."""
    label = labels(slots, 3, rows, seed=seed)
    x = tuple(
        normal(slots, rows, p, seed=100 * seed + m) + label[:, m, :, None]
        for m, p in enumerate(SHAPE.features.values())
    )
    noise = normal(2, slots, 3, rows, SHAPE.latent, seed=seed + 1)
    drawn = normal(slots, 3, rows, 3, seed=seed + 2).sign() if signs else None
    return Batch(x, label, samples(slots, rows, seed=seed), noise[0], noise[1], drawn)


def weights(
    losses: Sequence[str] = ("pairwise",),
    *,
    penalty_weight: float | Sequence[float] = 3.0,
    dtype: torch.dtype = torch.float64,
) -> Weights:
    """Return weights that all differ, so that swapped weights are detected."""
    ones = torch.ones(len(losses), dtype=dtype)
    return Weights(
        beta=0.02 * ones,
        adversarial=0.7 * ones,
        penalty_weight=torch.as_tensor(penalty_weight, dtype=dtype) * ones,
        classification=1.3 * ones,
        clustering=0.9 * ones,
        pseudo_label_threshold=0.35 * ones,
        prior=torch.full((len(losses), SHAPE.classes), 1 / SHAPE.classes, dtype=dtype),
        losses=tuple(losses),
    )


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Return the same values on another device."""

    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            return tuple(part.to(device) for part in value)
        return value

    return type(inputs)(**{field.name: move(getattr(inputs, field.name)) for field in fields(inputs)})


def step(state: TrainState, inputs: Batch, loss_weights: Weights, rules: Rules) -> tuple[Terms, Terms]:
    """Run both phases of a training step."""
    return state.adversary.learn(inputs, loss_weights, rules), state.vaes.learn(inputs, loss_weights, rules)


def loader(
    sets: Sequence[Prepared],
    seeds: Sequence[int],
    *,
    batch_size: int = 32,
    ends: EpochLength = "shortest",
    signs: bool = False,
    fraction: float = 0.0,
    device: torch.device = CPU,
) -> Loader:
    """Return a loader of prepared toy rows in float64."""
    return Loader(
        sets,
        seeds,
        batch_size=batch_size,
        epoch_length=ends,
        min_labelled_fraction=fraction,
        latent=SHAPE.latent,
        signs=signs,
        device=device,
        dtype=torch.float64,
    )


def prepared(rows: dict[str, int], *, seed: int = 0, features: dict[str, int] | None = None) -> Prepared:
    """Return training rows with random features; the first feature is the row number, and label = number mod 3."""
    rng = np.random.default_rng(seed)
    sizes = features or SHAPE.features
    x = {m: rng.standard_normal((n, sizes[m])).astype(np.float32) for m, n in rows.items()}
    for values in x.values():
        values[:, 0] = np.arange(len(values))
    label = {m: np.arange(n, dtype=np.int64) % 3 for m, n in rows.items()}
    names = {m: np.array([f"{m}{i}" for i in range(n)], dtype=object) for m, n in rows.items()}
    return Prepared(("u", "v", "w"), {}, Subset(x, label, names), None, None, ())
