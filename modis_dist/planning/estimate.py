"""Estimated cost of a study: remaining packs, refit, time, memory, disk."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modis_dist.config.run import Run
from modis_dist.config.study import OptunaSearch, Study
from modis_dist.data.open_store import simulated_store
from modis_dist.data.store.arrays import insufficient_scratch
from modis_dist.execution import memory
from modis_dist.execution.memory import COPIES_OF_LAST, model_bytes
from modis_dist.execution.run_pack import Pack, kinds_of_data, unfinished_packs
from modis_dist.execution.trial import Trial
from modis_dist.model.networks import Shape
from modis_dist.planning import timing
from modis_dist.study.manifest import refit, unique
from modis_dist.study.packs import group_into_packs, training_steps
from modis_dist.study.plan import Plan, is_done
from modis_dist.train.prepare import row_counts

TIMED_BYTES = 500_000_000  # of parameters; only a part of a larger stack is timed
SAVED_BYTES = 64_000_000  # of a larger checkpoint, a part of this size is timed and scaled
RANKS_START_S = 10.0  # start of the ranks of a pack by Ray Train
START_UP_S = {"ray": 15.0, "local": 3.0}  # Ray's start, first worker and end (16 s on 2 busy cores); imports


@dataclass(frozen=True)
class PackEstimate:
    """Cost of one pack, trained and validated to its last epoch; early stopping makes it cheaper."""

    pack: str
    trials: int
    steps_per_training: int
    seconds: float
    preparing_s: float  # part of ``seconds``: before the first step
    saving_s: float  # part of ``seconds``: all checkpoints
    save_s: float  # one checkpoint
    memory: int  # bytes on the node
    gpu_memory: int
    bytes: int  # permanent disk space: the best model of each trial
    checkpoint_bytes: int  # disk space during training: the last checkpoint
    scratch: int  # bytes of features in the temporary folder during training


@dataclass(frozen=True)
class TrialEntry:
    """One trial of the plan."""

    id: str
    name: str
    condition: str
    params: dict[str, object]
    fold: int | None
    seed: int
    done: bool


@dataclass(frozen=True)
class StudyEstimate:
    """Cost of the remaining part of a study."""

    study: str
    trials: int
    done: int
    trial_list: list[TrialEntry]
    packs: list[PackEstimate]
    refit_packs: list[PackEstimate]
    slots: int  # packs trained at once
    later_trials: int  # of rounds whose configurations depend on results; estimated like the first round
    seconds: float
    refit_seconds: float
    pack_seconds: float  # sum over packs
    bytes: int  # peak disk space: permanent files and the largest checkpoints held at once
    scratch: int  # peak bytes of features in temporary folders
    scratch_folder: str | None  # the temporary folder, if it is on this machine
    scratch_problem: str | None
    measured_on: str


@dataclass(frozen=True)
class Nodes:
    """The nodes that packs are estimated for, and the timings for them on this machine."""

    slots: int  # packs trained at once
    refit_slots: int
    threads: int  # CPU threads of a pack
    timing_folder: Path  # checkpoints are timed here
    remote: bool = False  # steps are timed on this machine's device, whatever the study requests
    memory: int | None = None  # bytes of a job; None: this machine's
    scratch_folder: Path | None = None  # the temporary folder of packs that train on this machine
    timed: dict[str, tuple[float, float]] = field(default_factory=dict)  # seconds of a step and a row, by timing_key


def estimate_plan(planned: Plan, out: Path, nodes: Nodes, *, start_s: float) -> StudyEstimate:
    """Return the estimated cost of the remaining part of a study in its output folder."""
    search, refits, first = (
        estimate_packs(planned, packs, nodes)
        for packs in (unfinished_packs(out, planned.packs()), refit_packs(planned), first_round(planned))
    )
    rounds, all_packs = planned.remaining_rounds, search + refits
    refit_s = wall_seconds([pack.seconds for pack in refits], slots=nodes.refit_slots)
    search_s, round_s = (wall_seconds([pack.seconds for pack in packs], slots=nodes.slots) for packs in (search, first))
    scratch = [[pack.scratch for pack in packs] for packs in (search, refits, first)]
    slots = (nodes.slots, nodes.refit_slots, nodes.slots)
    needed, problem = scratch_use(scratch, slots=slots, on_this_machine=nodes.scratch_folder is not None)
    trials = [
        TrialEntry(t.id, t.name, t.condition, dict(t.params), t.fold, t.run.seed, is_done(out, t))
        for t in unique(planned.manifest.trials)
    ]
    on_gpu = torch.cuda.is_available() and (nodes.remote or planned.on_gpu)
    return StudyEstimate(
        study=planned.study.name,
        trials=len(trials),
        done=sum(trial.done for trial in trials),
        trial_list=trials,
        packs=search,
        refit_packs=refits,
        slots=nodes.slots,
        later_trials=round(rounds * sum(pack.trials for pack in first)),
        seconds=search_s + refit_s + rounds * round_s + start_s,
        refit_seconds=refit_s,
        pack_seconds=sum(pack.seconds for pack in all_packs) + rounds * sum(pack.seconds for pack in first),
        bytes=sum(pack.bytes for pack in all_packs)
        + _largest([pack.checkpoint_bytes for pack in all_packs], nodes.slots)
        + round(rounds * sum(pack.bytes for pack in first)),
        scratch=needed,
        scratch_folder=str(nodes.scratch_folder) if nodes.scratch_folder else None,
        scratch_problem=problem,
        measured_on=torch.cuda.get_device_name() if on_gpu else "this machine's CPU",
    )


@contextmanager
def planning_folder(study: Study, out: Path) -> Iterator[Path]:
    """Yield the folder to plan in: the output folder if an earlier start left its data there, else a temporary one."""
    simulated = study.data.simulate
    with tempfile.TemporaryDirectory() as temporary:
        started = out.exists() if simulated is None else simulated_store(simulated, out=out).exists()
        yield out if started else Path(temporary)


def estimate_packs(planned: Plan, packs: Sequence[Pack], nodes: Nodes) -> list[PackEstimate]:
    """Return the cost of every pack; packs whose steps take the same time are timed once."""
    threads = torch.get_num_threads()
    try:
        return [_estimate(planned, pack, nodes) for pack in packs]
    finally:
        torch.set_num_threads(threads)


def _estimate(planned: Plan, pack: Pack, nodes: Nodes) -> PackEstimate:
    trial, members, selection_of = pack.trials[0], len(pack.trials), planned.selection_of
    similar = planned.similar(trial)
    shape, data = planned.shapes[similar], planned.data[similar]
    runs = [_trainable_here(member.run) if nodes.remote else member.run for member in pack.trials]
    run = runs[0]
    torch.set_num_threads(run.trainer.threads or nodes.threads)
    step_s, row_s = _step_and_row_s(runs, shape, nodes)
    steps = training_steps(trial, selection_of) * run.optim.epochs
    validations = -(-run.optim.epochs // run.trainer.validate_every)
    validated_rows = validations * sum(row_counts(run, selection_of(run)).validation.values())  # of one member
    start_s = RANKS_START_S if run.trainer.workers > 1 else 0.0
    per_multiplication = timing.seconds_per_multiplication() if data.multiplications else 0.0
    preparing_s = kinds_of_data(pack) * data.total_seconds(per_multiplication)
    model = model_bytes(shape, slots=members)
    last = model * COPIES_OF_LAST
    save_s = timing.seconds_per_save(min(last, SAVED_BYTES), nodes.timing_folder) * max(1.0, last / SAVED_BYTES)
    saving_s = -(-run.optim.epochs // run.trainer.checkpoint_every) * save_s
    size = memory.estimate_footprint(pack, planned.store, shape, gpu=planned.on_gpu, limit=nodes.memory)
    return PackEstimate(
        pack=pack.id,
        trials=members,
        steps_per_training=steps,
        seconds=steps * step_s + validated_rows * row_s + start_s + saving_s + preparing_s,
        preparing_s=preparing_s,
        saving_s=saving_s,
        save_s=save_s,
        memory=size.host,
        gpu_memory=size.gpu,
        bytes=model,
        checkpoint_bytes=last,
        scratch=memory.on_disk(pack, planned.store, selection_of, limit=nodes.memory),
    )


def _step_and_row_s(runs: Sequence[Run], shape: Shape, nodes: Nodes) -> tuple[float, float]:
    """Return the seconds of a step and of a validated row of a stack; a large stack is timed in part and scaled."""
    part = runs[: max(1, TIMED_BYTES // model_bytes(shape, slots=1))]
    key, scale = timing.timing_key(part, shape), len(runs) / len(part)
    if key not in nodes.timed:
        nodes.timed[key] = timing.seconds_per_step(part, shape), timing.seconds_per_row(part, shape)
    step_s, row_s = nodes.timed[key]
    return scale * step_s, scale * row_s


def _trainable_here(run: Run) -> Run:
    precision = "bf16" if run.trainer.precision == "fp16" and not torch.cuda.is_available() else run.trainer.precision
    return run.model_copy(update={"trainer": run.trainer.model_copy(update={"device": "auto", "precision": precision})})


def refit_packs(planned: Plan) -> list[Pack]:
    """Return placeholder refit packs: the first configuration of every condition, each replicate, on all training rows.

    The chosen configuration and its epochs are not known before the search.
    """
    candidates: dict[tuple[str, int], Trial] = {}
    for trial in planned.manifest.trials:
        candidates.setdefault((trial.condition, trial.replicate), trial)
    fingerprint = planned.manifest.fingerprint
    refits = unique(refit(trial, fingerprint, epochs=trial.run.optim.epochs) for trial in candidates.values())
    packs = group_into_packs(refits, planned.selection_of, max_pack_size=planned.max_pack_size, slots=1)
    return [Pack(pack, "test", planned.study.sweep.probe) for pack in packs]


def first_round(planned: Plan) -> list[Pack]:
    """Return the packs of the first search round, done or not, if later rounds depend on results."""
    search = planned.study.sweep.search
    if not planned.remaining_rounds or not isinstance(search, OptunaSearch):
        return []
    return [pack for pack in planned.packs() if pack.trials[0].configuration < search.round_size]


def wall_seconds(seconds: Sequence[float], *, slots: int) -> float:
    """Return the wall time of packs if each free slot takes the longest remaining pack."""
    busy = [0.0] * slots
    for pack in sorted(seconds, reverse=True):
        busy[busy.index(min(busy))] += pack
    return max(busy)


def scratch_use(
    stages: Sequence[Sequence[int]], *, slots: Sequence[int], on_this_machine: bool
) -> tuple[int, str | None]:
    """Return the peak bytes of features on disk over stages of packs, and a problem if this disk is too small."""
    peak = max(_largest(sizes, count) for sizes, count in zip(stages, slots, strict=True))
    problem = insufficient_scratch(peak) if peak and on_this_machine else None
    if problem and insufficient_scratch(max(max(sizes, default=0) for sizes in stages)) is None:
        problem += "; or train fewer packs at once (sweep.resources), one pack alone fits"
    return peak, problem


def _largest(sizes: Sequence[int], count: int) -> int:
    return sum(sorted(sizes, reverse=True)[:count])
