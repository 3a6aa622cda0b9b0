"""Short timings on this machine, on random data with the shapes of a study: a step, validation, a checkpoint, a PCA."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from modis_dist.config.parse import digest
from modis_dist.config.run import Run
from modis_dist.data.store.arrays import BYTES_PER_VALUE
from modis_dist.execution.run_pack import chosen_device
from modis_dist.model.networks import Modis, Shape
from modis_dist.objective import Batch
from modis_dist.train.checkpoint import Checkpoint, save
from modis_dist.train.cuda_graph import WARM_UP
from modis_dist.train.stack import rules, weights
from modis_dist.train.state import Setup, TrainState

MAX_REPEATS = 5  # after one warm-up repeat
MAX_S = 2.0  # no further repeat starts after this time
SVD_SHAPE = (300, 1200)  # rows and features
SVD_THREADS = 2  # login nodes are shared


def shortest(work: Callable[[], None]) -> float:
    """Return the shortest time of a few repeats after a warm-up; long work is timed once after it."""
    times: list[float] = []
    while len(times) < 2 or (len(times) <= MAX_REPEATS and sum(times) < MAX_S):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def timing_key(runs: Sequence[Run], shape: Shape) -> str:
    """Return a key that is equal for stacks whose steps take the same time."""
    objective = runs[0].objective
    shared = [rows_of_rank(runs[0]), objective.penalty_outputs, objective.penalty_inputs, runs[0].trainer.precision]
    per_member = sorted((run.objective.adversarial_loss, run.objective.penalty_weight > 0) for run in runs)
    return digest([repr(shape), runs[0].trainer.threads, shared, per_member])


def rows_of_rank(run: Run) -> int:
    """Return the maximum number of rows of each modality that a rank has of a batch."""
    return -(-run.optim.batch_size // run.trainer.workers)


def seconds_per_step(runs: Sequence[Run], shape: Shape) -> float:
    """Return the time of one two-phase step of a stack.

    With several ranks, one rank is timed on its block of a batch; communication is not counted.
    """
    run, members = runs[0], len(runs)
    device = chosen_device(run)
    setup = Setup(run.optim, device, scaled=run.trainer.precision == "fp16")
    state = TrainState.start(shape, range(members), setup)
    batch = _random_batch(run, shape, members, device)
    prior = torch.full((members, shape.classes), 1 / shape.classes, device=device)
    loss_weights, loss_rules = weights(runs, prior), rules(run)

    def step() -> None:
        loaded = replace(batch)  # a new object as from a loader: a CUDA graph copies its tensors
        state.adversary.learn(loaded, loss_weights, loss_rules)
        state.vaes.learn(loaded, loss_weights, loss_rules)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        for _ in range(WARM_UP):  # capture takes seconds; the timing would end before the first replay
            step()
    return shortest(step)


def seconds_per_row(runs: Sequence[Run], shape: Shape) -> float:
    """Return the time in which a stack encodes, classifies and decodes one row per member; ranks share the rows."""
    run, members = runs[0], len(runs)
    device = chosen_device(run)
    model = Modis(shape, slots=members).to(device).eval()
    batch = _random_batch(run, shape, members, device)

    @torch.no_grad()
    def validate() -> None:
        for modality, x in zip(shape.features, batch.x, strict=True):
            mu, _ = model.vae(modality).encode(x)
            model.discriminator(mu).label.argmax(-1).cpu()
            model.vae(modality).reconstruct(mu).mean().cpu()

    return shortest(validate) / (run.trainer.workers * rows_of_rank(run) * len(shape.features))


@cache
def seconds_per_save(size: int, folder: Path) -> float:
    """Return the time to write, hash and read back a checkpoint of ``size`` bytes in a folder.

    Falls back to the folder's parent, then to the folder for temporary files.
    """
    content = {"model": {"x": torch.rand(max(1, size // BYTES_PER_VALUE))}}
    for candidate in (folder, folder.parent, Path(gettempdir())):
        with suppress(OSError), TemporaryDirectory(prefix=".timing-", dir=candidate) as inside:
            start = time.perf_counter()
            save(Path(inside) / "last", Checkpoint(0, content, {}))
            return time.perf_counter() - start
    return 0.0


@cache
def seconds_per_multiplication() -> float:
    """Return the time of a PCA divided by rows x features x min(rows, features)."""
    rows, features = SVD_SHAPE
    x = np.random.default_rng(0).normal(size=SVD_SHAPE)

    def decompose() -> None:
        np.linalg.svd(x, full_matrices=False)

    with threadpool_limits(SVD_THREADS, user_api="blas"):
        return shortest(decompose) / (rows * features * min(SVD_SHAPE))


def _random_batch(run: Run, shape: Shape, members: int, device: torch.device) -> Batch:
    rows, modalities = rows_of_rank(run), len(shape.features)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    label = torch.randint(shape.classes, (members, modalities, rows), generator=generator).to(device)
    noise = (members, modalities, rows, shape.latent)
    signs = normal(members, modalities, rows, modalities).sign() if run.objective.penalty_outputs == "each" else None
    x = tuple(normal(members, rows, p).abs() for p in shape.features.values())  # also valid as log counts
    sample = torch.arange(rows, device=device).expand(label.shape).contiguous()
    return Batch(x, label, sample, normal(*noise), normal(*noise), signs)
