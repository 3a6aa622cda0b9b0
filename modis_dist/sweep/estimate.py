"""What a study will cost, from a short probe on random numbers of the right shape."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

import torch

from modis_dist.config.parse import digest
from modis_dist.config.run import Run
from modis_dist.model.networks import Shape
from modis_dist.objective import Batch, Rules, Weights, adversary_phase, vae_phase
from modis_dist.sweep.execute import Pack, chosen_device
from modis_dist.sweep.packs import training_steps
from modis_dist.train.loop import update
from modis_dist.train.prepare import Selection
from modis_dist.train.state import TrainState

PROBE_STEPS = 5
BYTES_PER_NUMBER = 4
COPIES_OF_LAST = 4  # parameters, two moments, best


@dataclass(frozen=True)
class Cost:
    """Of one pack, trained to its last epoch; early stopping makes it cheaper."""

    trials: int
    steps: int
    seconds: float
    bytes: int


def costs(packs: Sequence[Pack], selection: Selection, shapes: Sequence[Shape], *, threads: int) -> list[Cost]:
    """Seconds and disk of every pack; packs of one shape and size are probed once."""
    known: dict[str, float] = {}
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for pack, shape in zip(packs, shapes, strict=True):
            run, replicates = pack.trials[0].run, len(pack.trials)
            key = digest([repr(shape), replicates, run.optim.batch_size, run.objective.lambda_r > 0])
            if key not in known:
                known[key] = seconds_per_step(run, shape, replicates=replicates)
            steps = training_steps(pack.trials[0], selection) * run.optim.epochs
            found.append(Cost(replicates, steps, steps * known[key], _disk(shape, replicates)))
    finally:
        torch.set_num_threads(before)
    return found


def wall_seconds(found: Sequence[Cost], *, slots: int) -> float:
    """Time of all packs on so many slots, the longest first."""
    busy = [0.0] * slots
    for cost in sorted(found, key=lambda c: -c.seconds):
        position = busy.index(min(busy))
        busy[position] += cost.seconds
    return max(busy)


def seconds_per_step(run: Run, shape: Shape, *, replicates: int) -> float:
    """Median time of a two-phase step after one that warms up."""
    device = chosen_device(run)
    state = TrainState.start(shape, range(replicates), optim=run.optim, device=device, dtype=torch.float32)
    batch, weights = _random_batch(run, shape, replicates, device), _equal_weights(run, shape, replicates, device)
    rules = Rules(run.objective.kl_reduction, run.objective.penalty, run.objective.penalty_on)
    times = []
    for _ in range(PROBE_STEPS + 1):
        begin = time.perf_counter()
        update(state.adversary_optimiser, adversary_phase(state.model, batch, weights, rules).total)
        update(state.vae_optimiser, vae_phase(state.model, batch, weights, rules).total)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def _random_batch(run: Run, shape: Shape, replicates: int, device: torch.device) -> Batch:
    rows, modalities = run.optim.batch_size, len(shape.features)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    label = torch.randint(shape.classes, (replicates, modalities, rows), generator=generator).to(device)
    noise = (replicates, modalities, rows, shape.latent)
    signs = normal(replicates, modalities, rows, modalities).sign() if run.objective.penalty == "each" else None
    x = tuple(normal(replicates, rows, p) for p in shape.features.values())
    return Batch(x, label, normal(*noise), normal(*noise), signs)


def _equal_weights(run: Run, shape: Shape, replicates: int, device: torch.device) -> Weights:
    one = torch.ones(replicates, device=device)
    objective = run.objective
    prior = torch.full((replicates, shape.classes), 1 / shape.classes, device=device)
    kinds = (objective.adversarial_loss,) * replicates
    return Weights(one * objective.beta, one, one * objective.lambda_r, one, one, one, prior, kinds)


def _disk(shape: Shape, replicates: int) -> int:
    """Bytes of the last checkpoint of a pack and the best model of each trial."""
    from modis_dist.model.networks import Modis

    with torch.device("meta"):
        numbers = sum(prod(t.shape[1:]) for t in Modis(shape).state_dict().values())
    return int(numbers * BYTES_PER_NUMBER * replicates * (COPIES_OF_LAST + 1))


def as_rows(packs: Sequence[Pack], found: Sequence[Cost]) -> list[dict[str, Any]]:
    """Plain values for a table or JSON."""
    return [
        {"pack": pack.id, "trials": cost.trials, "steps": cost.steps, "seconds": cost.seconds, "bytes": cost.bytes}
        for pack, cost in zip(packs, found, strict=True)
    ]
