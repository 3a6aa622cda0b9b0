"""Which trials are trained together as one stack.

Trials that differ only in seed, fold, scenario and loss weights, and whose epochs have the same number of steps, are
replicates of one stack. A stack is as large as allowed, but small enough that no core or GPU waits for another. How
large is counted, not timed: the same study is laid out in the same way whenever it is started.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

from modis_dist.config.parse import digest, to_tree
from modis_dist.config.run import Objective
from modis_dist.config.study import Packing
from modis_dist.execution.trial import Trial
from modis_dist.train.loader import steps_per_epoch
from modis_dist.train.prepare import SelectionOf, row_counts

SHARED_OBJECTIVE = ("kl_reduction", "penalty", "penalty_on")  # the rest may differ within a stack
assert set(SHARED_OBJECTIVE) < set(Objective.model_fields)


# Trials in a pack. On a processor more gain little of InterSIM's size (``python -m tools.bench pack``); on a GPU steps
# of small networks take what their kernels take to start, however many replicates are in one.
MOST, MOST_ON_GPU = 8, 32
TOGETHER = 1_500_000_000  # bytes of networks in a pack: with gradients, moments and data it fits a GPU of 16 GB


def most_in_one_pack(packing: Packing, each: int, *, on_gpu: bool) -> int:
    """How many trials may be one pack, whose networks take so many bytes each."""
    if not packing.enabled:
        return 1
    return packing.max_trials or max(1, min(MOST_ON_GPU if on_gpu else MOST, TOGETHER // each))


def arrange(
    trials: Sequence[Trial], selection_of: SelectionOf, *, most: Callable[[Trial], int], slots: int
) -> tuple[tuple[Trial, ...], ...]:
    """The trials grouped into packs, a multiple of ``slots`` of them where there are enough trials.

    ``most``: how many trials like this one may be in one pack.
    """
    alike: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        alike[stack_key(trial, selection_of)].append(trial)
    groups = [_by_rows(group) for group in alike.values()]
    fewest = [-(-len(group) // most(group[0])) for group in groups]
    counts = _full_rounds(slots, [len(group) for group in groups], fewest)
    return tuple(tuple(pack) for group, count in zip(groups, counts, strict=True) for pack in _even(group, count))


def layout(
    trials: Sequence[Trial],
    selection_of: SelectionOf,
    *,
    earlier: Sequence[Sequence[str]],
    done: Callable[[Trial], bool],
    most: Callable[[Trial], int],
    slots: int,
) -> tuple[tuple[Trial, ...], ...]:
    """The packs of a sweep that may have been started before.

    A pack of an earlier start stays as it was, with its checkpoint, where all its trials are still wanted. The trials
    that are in none and not done are packed anew; what is done is never trained again.
    """
    wanted = {trial.id: trial for trial in trials}
    kept = [tuple(wanted[name] for name in pack) for pack in earlier if all(name in wanted for name in pack)]
    packed = {trial.id for pack in kept for trial in pack}
    rest = [trial for trial in wanted.values() if trial.id not in packed and not done(trial)]
    return (*kept, *arrange(rest, selection_of, most=most, slots=slots))


def stack_key(trial: Trial, selection_of: SelectionOf) -> str:
    """Equal for trials that can be replicates of one stack."""
    tree = to_tree(trial.run)
    tree.pop("seed")
    tree.pop("scenario")
    tree.pop("name")
    tree["data"]["split"].pop("fold")
    tree["objective"] = {key: tree["objective"][key] for key in SHARED_OBJECTIVE}
    # An overflow in fp16 skips a step of the whole stack, and a replicate's result is its own.
    alone = trial.id if trial.run.trainer.precision == "fp16" else None
    # In a lower precision the discriminator learns in it only where nobody in the stack has a penalty.
    penalised = trial.run.objective.lambda_r > 0 if trial.run.trainer.precision != "fp32" else None
    return digest([tree, training_steps(trial, selection_of), alone, penalised])


def training_steps(trial: Trial, selection_of: SelectionOf) -> int:
    """Steps in one epoch of a trial."""
    optim = trial.run.optim
    rows = row_counts(trial.run, selection_of(trial.run)).train
    return steps_per_epoch(rows, batch_size=optim.batch_size, epoch_ends=optim.epoch_ends)


def _by_rows(group: list[Trial]) -> list[Trial]:
    """Trials that share rows (a fold, a seed) next to each other: a pack then holds fewer copies of the data."""
    return sorted(group, key=lambda trial: (trial.fold or 0, trial.replicate, trial.condition, trial.configuration))


def _even(group: list[Trial], count: int) -> list[list[Trial]]:
    """So many parts, of sizes that differ by one at most."""
    size, larger = divmod(len(group), count)
    ends = [number * size + min(number, larger) for number in range(count + 1)]
    return [group[start:end] for start, end in pairwise(ends)]


def _full_rounds(slots: int, trials: list[int], packs: list[int]) -> list[int]:
    """Into how many packs groups of so many trials are parted, given the fewest: more until no round has a free slot.

    As many rounds of smaller packs take less time.
    """
    counts = list(packs)
    wanted = -(-sum(counts) // slots) * slots
    while sum(counts) < wanted:
        sizes = [-(-of_group // count) for of_group, count in zip(trials, counts, strict=True)]
        if max(sizes) == 1:
            break
        counts[sizes.index(max(sizes))] += 1
    return counts
