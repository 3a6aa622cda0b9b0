"""What a study will cost, from a short probe on random numbers of the right shape: about, not exactly."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from modis_dist.config.parse import digest
from modis_dist.config.run import Run
from modis_dist.config.study import OptunaSearch
from modis_dist.execution.memory import BYTES_PER_NUMBER, COPIES_OF_LAST, Footprint, model_bytes
from modis_dist.execution.run_pack import Pack, chosen_device
from modis_dist.execution.trial import Trial
from modis_dist.model.networks import Modis, Shape
from modis_dist.objective import Batch, Rules, Weights
from modis_dist.study.manifest import refit, unique
from modis_dist.study.packs import arrange, training_steps
from modis_dist.study.plan import Plan
from modis_dist.train.checkpoint import Checkpoint, save
from modis_dist.train.cuda_graph import WARM_UP
from modis_dist.train.loop import AUTOCAST_DTYPES
from modis_dist.train.prepare import PreparationEstimate, SelectionOf, data_key, row_counts
from modis_dist.train.state import Setup, TrainState

PROBE_STEPS = 5  # at most, after one that warms up
PROBE_S = 2.0  # no further step begins after so long
PROBE_BYTES = 500_000_000  # of parameters: of a larger stack a part is probed, whose time grows with its replicates
SAVED_BYTES = 64_000_000  # of a larger checkpoint a part is written, whose time grows with its size
SVD = (300, 1200)  # rows and features that are decomposed to time principal components
FEW_THREADS = 2  # for that: a login node is shared
RANKS_START_S = 10.0  # of the ranks of a pack, by Ray Train
START_UP_S = {"ray": 15.0, "local": 3.0}  # Ray, its first worker and its end (16 s measured on 2 busy cores); imports


Probed = dict[str, tuple[float, float]]  # seconds of a step and of a validated row, by ``probe_key``


@dataclass(frozen=True)
class Cost:
    """Of one pack, trained and validated to its last epoch; early stopping makes it cheaper."""

    trials: int
    steps: int
    seconds: float
    bytes: int  # that stay: the best model of each trial
    passing: int = 0  # bytes while it is trained: its last checkpoint
    save_s: float = 0  # to write the last checkpoint once
    saving_s: float = 0  # of the seconds, those of all checkpoints
    preparing_s: float = 0  # of the seconds, those before its first step


@dataclass(frozen=True)
class Sizes:
    """Of the networks of a pack, and of preparing its data."""

    shape: Shape
    data: PreparationEstimate


def sizes_of(planned: Plan, packs: Sequence[Pack]) -> list[Sizes]:
    """Of each pack; those of a refit are of the first trial of its condition."""
    of_condition = {trial.condition: trial.id for trial in reversed(planned.manifest.trials)}
    first = [pack.trials[0] for pack in packs]
    names = [trial.id if trial.id in planned.shapes else of_condition[trial.condition] for trial in first]
    return [Sizes(planned.shapes[name], planned.data[name]) for name in names]


def costs(
    packs: Sequence[Pack],
    sizes: Sequence[Sizes],
    selection_of: SelectionOf,
    *,
    threads: int,
    folder: Path,
    known: Probed,
    elsewhere: bool = False,
) -> list[Cost]:
    """Seconds and disk of every pack, whose checkpoints go to a folder; packs of one shape and size are probed once.

    Those that are trained ``elsewhere`` are probed on what this machine has. ``known`` is what was probed before; what
    is probed now is added.
    """
    per_multiplication = seconds_per_multiplication() if any(one.data.multiplications for one in sizes) else 0.0
    found = []
    before = torch.get_num_threads()
    try:
        for pack, held in zip(packs, sizes, strict=True):
            runs = [_as_here(trial.run) if elsewhere else trial.run for trial in pack.trials]
            run, shape = runs[0], held.shape
            torch.set_num_threads(run.trainer.threads or threads)
            part = runs[: max(1, PROBE_BYTES // model_bytes(shape, replicates=1))]
            key, times = probe_key(part, shape), len(runs) / len(part)
            if key not in known:
                known[key] = seconds_per_step(part, shape), seconds_per_row(part, shape)
            of_step, of_row = (times * seconds for seconds in known[key])
            steps = training_steps(pack.trials[0], selection_of) * run.optim.epochs
            training = steps * of_step + validated_rows(run, selection_of) * of_row
            training += RANKS_START_S if run.trainer.workers > 1 else 0
            preparing = _kinds_of_data(pack) * held.data.total_seconds(per_multiplication)
            found.append(_with_checkpoints(run, training, preparing, steps, shape, folder, trials=len(runs)))
    finally:
        torch.set_num_threads(before)
    return found


def _with_checkpoints(
    run: Run, training: float, preparing: float, steps: int, shape: Shape, folder: Path, *, trials: int
) -> Cost:
    kept = model_bytes(shape, replicates=trials)
    last = kept * COPIES_OF_LAST
    save = seconds_per_save(min(last, SAVED_BYTES), folder) * max(1.0, last / SAVED_BYTES)
    saving = -(-run.optim.epochs // run.trainer.checkpoint_every) * save
    return Cost(trials, steps, training + saving + preparing, kept, last, save, saving, preparing)


def _kinds_of_data(pack: Pack) -> int:
    """How often data are prepared for a pack: for each fold and scenario in it."""
    return len({data_key(trial.run, "") for trial in pack.trials})


@cache
def seconds_per_save(size: int, folder: Path) -> float:
    """Seconds in which a checkpoint of so many bytes is written, hashed and read back in a folder, or above it.

    Where neither lets us, in the folder for temporary files.
    """
    content = {"model": {"x": torch.rand(max(1, size // BYTES_PER_NUMBER))}}
    for place in (folder, folder.parent, Path(gettempdir())):
        with suppress(OSError), TemporaryDirectory(prefix=".probe-", dir=place) as inside:
            begin = time.perf_counter()
            save(Path(inside) / "last", Checkpoint(0, content, {}))
            return time.perf_counter() - begin
    return 0.0


@cache
def seconds_per_multiplication() -> float:
    """Seconds that principal components take for each of rows x features x the smaller of both."""
    rows, features = SVD
    x = np.random.default_rng(0).normal(size=SVD)

    def decompose() -> None:
        np.linalg.svd(x, full_matrices=False)

    with threadpool_limits(FEW_THREADS, user_api="blas"):
        return shortest(decompose) / (rows * features * min(SVD))


def _as_here(run: Run) -> Run:
    """A run that this machine can train, on its GPU or its processor."""
    precision = "bf16" if run.trainer.precision == "fp16" and not torch.cuda.is_available() else run.trainer.precision
    return run.model_copy(update={"trainer": run.trainer.model_copy(update={"device": "auto", "precision": precision})})


def shortest(work: Callable[[], None]) -> float:
    """Shortest time, of a few, of some work after a turn that warms up; long work is not done often."""
    times: list[float] = []
    while len(times) < 2 or (len(times) <= PROBE_STEPS and sum(times) < PROBE_S):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def wall_seconds(found: Sequence[Cost], *, slots: int) -> float:
    """Time of all packs on so many slots, each taking the longest that is left."""
    busy = [0.0] * slots
    for cost in sorted(found, key=lambda c: -c.seconds):
        position = busy.index(min(busy))
        busy[position] += cost.seconds
    return max(busy)


def refits(planned: Plan) -> list[Pack]:
    """Stand-ins for the refits: of every condition the first configuration, each replicate, on all training rows.

    Which configuration is chosen, and for how many epochs, is not known before the search.
    """
    first: dict[tuple[str, int], Trial] = {}
    for trial in planned.manifest.trials:
        first.setdefault((trial.condition, trial.replicate), trial)
    fingerprint = planned.manifest.fingerprint
    again = unique(refit(trial, fingerprint, epochs=trial.run.optim.epochs) for trial in first.values())
    packs = arrange(again, planned.selection_of, most=planned.most, slots=1)
    return [Pack(pack, "test", planned.study.sweep.probe) for pack in packs]


def first_round(planned: Plan) -> list[Pack]:
    """The packs of the first round, where rounds are still to come; they may be done already."""
    search = planned.study.sweep.search
    if not planned.to_come or not isinstance(search, OptunaSearch):
        return []
    return [pack for pack in planned.packs() if pack.trials[0].configuration < search.round_size]


def probe_key(runs: Sequence[Run], shape: Shape) -> str:
    """Equal for stacks whose steps take the same time."""
    objective = runs[0].objective
    shared = [rows_of_rank(runs[0]), objective.penalty_outputs, objective.penalty_inputs, runs[0].trainer.precision]
    own = sorted((run.objective.adversarial_loss, run.objective.penalty_weight > 0) for run in runs)
    return digest([repr(shape), runs[0].trainer.threads, shared, own])


def rows_of_rank(run: Run) -> int:
    """Rows of each modality in the largest block that a rank has of a batch."""
    return -(-run.optim.batch_size // run.trainer.workers)


def validated_rows(run: Run, selection_of: SelectionOf) -> int:
    """Rows that one replicate's validations read in all epochs."""
    every = run.trainer.validate_every
    return sum(row_counts(run, selection_of(run)).validation.values()) * -(-run.optim.epochs // every)


def seconds_per_row(runs: Sequence[Run], shape: Shape) -> float:
    """Shortest time, of a few, in which a stack encodes, classifies and decodes one row of each replicate.

    Several ranks share out the rows.
    """
    run, replicates = runs[0], len(runs)
    device = chosen_device(run)
    model = Modis(shape, slots=replicates).to(device).eval()
    batch = _random_batch(run, shape, replicates, device)

    @torch.no_grad()
    def validate() -> None:
        for modality, x in zip(shape.features, batch.x, strict=True):
            mu, _ = model.vae(modality).encode(x)
            model.discriminator(mu).label.argmax(-1).cpu()
            model.vae(modality).reconstruct(mu).mean().cpu()

    return shortest(validate) / (run.trainer.workers * rows_of_rank(run) * len(shape.features))


def seconds_per_step(runs: Sequence[Run], shape: Shape) -> float:
    """Shortest time, of a few, of a two-phase step of a stack after one that warms up.

    Of several ranks one is timed, on its block of a batch; what they tell each other is not counted.
    """
    run, replicates = runs[0], len(runs)
    device = chosen_device(run)
    setup = Setup(run.optim, device, scaled=run.trainer.precision == "fp16")
    state = TrainState.start(shape, range(replicates), setup)
    batch, weights = _random_batch(run, shape, replicates, device), _weights(runs, shape, device)
    rules = Rules(
        run.objective.kl_reduction,
        run.objective.penalty_outputs,
        run.objective.penalty_inputs,
        AUTOCAST_DTYPES[run.trainer.precision],
    )

    def step() -> None:
        given = replace(batch)  # as a loader's, which is copied to where recorded steps read it
        state.adversary.learn(given, weights, rules)
        state.vaes.learn(given, weights, rules)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        for _ in range(WARM_UP):  # the first takes seconds, after which no recorded one would be timed
            step()
    return shortest(step)


def _random_batch(run: Run, shape: Shape, replicates: int, device: torch.device) -> Batch:
    rows, modalities = rows_of_rank(run), len(shape.features)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    label = torch.randint(shape.classes, (replicates, modalities, rows), generator=generator).to(device)
    noise = (replicates, modalities, rows, shape.latent)
    signs = normal(replicates, modalities, rows, modalities).sign() if run.objective.penalty_outputs == "each" else None
    x = tuple(normal(replicates, rows, p).abs() for p in shape.features.values())  # logarithms of counts, maybe
    sample = torch.arange(rows, device=device).expand(label.shape).contiguous()
    return Batch(x, label, sample, normal(*noise), normal(*noise), signs)


def _weights(runs: Sequence[Run], shape: Shape, device: torch.device) -> Weights:
    one = torch.ones(len(runs), device=device)
    lambda_r = torch.tensor([run.objective.penalty_weight for run in runs], device=device)
    prior = torch.full((len(runs), shape.classes), 1 / shape.classes, device=device)
    kinds = tuple(run.objective.adversarial_loss for run in runs)
    return Weights(one * runs[0].objective.beta, one, lambda_r, one, one, one, prior, kinds)


def disk_bytes(found: Sequence[Cost], *, slots: int) -> int:
    """The most that is on the disk at once: what stays, and the largest packs in training."""
    return sum(cost.bytes for cost in found) + at_once([cost.passing for cost in found], slots=slots)


def at_once(sizes: Sequence[int], *, slots: int) -> int:
    """The most that packs of such sizes take together, so many of them side by side."""
    return sum(sorted(sizes, reverse=True)[:slots])


def as_rows(
    packs: Sequence[Pack], found: Sequence[Cost], memories: Sequence[Footprint], scratch: Sequence[int]
) -> list[dict[str, Any]]:
    """Plain values for a table or JSON."""
    return [
        {"pack": pack.id, "memory": memory.host, "gpu_memory": memory.gpu, "scratch": kept} | asdict(cost)
        for pack, cost, memory, kept in zip(packs, found, memories, scratch, strict=True)
    ]
