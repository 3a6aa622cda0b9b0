"""Packs: trials that are trained together as one stack.

Trials that differ only in seed, fold, scenario and loss weights, and whose epochs have the same number of steps, are
members of one stack. A stack is as large as allowed, but small enough that no core or GPU idles. Its size is computed,
not timed, so that the same study always has the same packs.
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

SHARED_OBJECTIVE = ("kl_reduction", "penalty_outputs", "penalty_inputs")  # the rest may differ within a stack
assert set(SHARED_OBJECTIVE) < set(Objective.model_fields)


# Maximum trials in a pack. On a CPU, larger stacks gain little at InterSIM's size (``python -m tools.bench pack``). On
# a GPU, a step of small networks takes as long as launching its kernels, however many members there are.
MAX_ON_CPU, MAX_ON_GPU = 8, 32
MAX_BYTES = 1_500_000_000  # of networks in a pack: with gradients, moments and data it fits a GPU of 16 GB


def pack_size_limit(packing: Packing, each: int, *, on_gpu: bool) -> int:
    """Return the maximum number of trials in a pack; ``each``: bytes of the networks of one trial."""
    if not packing.enabled:
        return 1
    return packing.max_trials or max(1, min(MAX_ON_GPU if on_gpu else MAX_ON_CPU, MAX_BYTES // each))


def group_into_packs(
    trials: Sequence[Trial], selection_of: SelectionOf, *, max_pack_size: Callable[[Trial], int], slots: int
) -> tuple[tuple[Trial, ...], ...]:
    """Group trials into packs, a multiple of ``slots`` of them if there are enough trials.

    ``max_pack_size`` returns the maximum number of trials in a pack for trials like the given one.
    """
    stackable: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        stackable[stack_key(trial, selection_of)].append(trial)
    groups = [sorted(group, key=_rows_first) for group in stackable.values()]
    fewest = [-(-len(group) // max_pack_size(group[0])) for group in groups]
    counts = _full_rounds(slots, [len(group) for group in groups], fewest)
    return tuple(tuple(pack) for group, count in zip(groups, counts, strict=True) for pack in _split(group, count))


def arrange_packs(
    trials: Sequence[Trial],
    selection_of: SelectionOf,
    *,
    earlier: Sequence[Sequence[str]],
    done: Callable[[Trial], bool],
    max_pack_size: Callable[[Trial], int],
    slots: int,
) -> tuple[tuple[Trial, ...], ...]:
    """Return the packs of a study that may have been started before.

    A pack of an earlier start stays as it was, with its checkpoint, if all its trials are still in the study. Other
    trials that are not done get new packs; a trial that is done is never trained again.
    """
    by_id = {trial.id: trial for trial in trials}
    existing = [tuple(by_id[name] for name in pack) for pack in earlier if all(name in by_id for name in pack)]
    packed = {trial.id for pack in existing for trial in pack}
    rest = [trial for trial in by_id.values() if trial.id not in packed and not done(trial)]
    return (*existing, *group_into_packs(rest, selection_of, max_pack_size=max_pack_size, slots=slots))


def stack_key(trial: Trial, selection_of: SelectionOf) -> str:
    """Return a key that is equal for trials that can be members of one stack."""
    tree = to_tree(trial.run)
    tree.pop("seed")
    tree.pop("scenario")
    tree.pop("name")
    tree["data"]["split"].pop("fold")
    tree["objective"] = {key: tree["objective"][key] for key in SHARED_OBJECTIVE}
    # An overflow in fp16 skips a step of the whole stack, but results must not depend on other members.
    unstacked = trial.id if trial.run.trainer.precision == "fp16" else None
    # The discriminator is trained in lower precision only if no member of the stack has a penalty.
    penalised = trial.run.objective.penalty_weight > 0 if trial.run.trainer.precision != "fp32" else None
    return digest([tree, training_steps(trial, selection_of), unstacked, penalised])


def training_steps(trial: Trial, selection_of: SelectionOf) -> int:
    """Return the steps in one epoch of a trial."""
    optim = trial.run.optim
    rows = row_counts(trial.run, selection_of(trial.run)).train
    return steps_per_epoch(rows, batch_size=optim.batch_size, epoch_length=optim.epoch_length)


def _rows_first(trial: Trial) -> tuple[int, int, str, int]:
    """Return a sort key that puts trials on the same rows next to each other: a pack then has fewer copies of data."""
    return trial.fold or 0, trial.replicate, trial.condition, trial.configuration


def _split(group: list[Trial], count: int) -> list[list[Trial]]:
    """Split into ``count`` parts whose sizes differ by one at most."""
    size, larger = divmod(len(group), count)
    ends = [number * size + min(number, larger) for number in range(count + 1)]
    return [group[start:end] for start, end in pairwise(ends)]


def _full_rounds(slots: int, trials: list[int], packs: list[int]) -> list[int]:
    """Return the number of packs of each group: the fewest, raised until no round of packs leaves a slot free.

    The same number of rounds with smaller packs takes less time.
    """
    counts = list(packs)
    total = -(-sum(counts) // slots) * slots
    while sum(counts) < total:
        sizes = [-(-members // count) for members, count in zip(trials, counts, strict=True)]
        if max(sizes) == 1:
            break
        counts[sizes.index(max(sizes))] += 1
    return counts
