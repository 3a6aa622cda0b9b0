"""Scenarios: selection of training rows and hiding of labels. Validation and test rows are never changed.

Rows are chosen by the rank of a keyed hash of their sample id: counts are exact, levels are nested (rows kept at 10 %
are among those kept at 50 %) and the order of rows does not matter. Fractions of n rows are rounded half up. Steps use
the classes of the store: a row with a hidden label still belongs to its class in later steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.run import CutClass, DropPairs, HideLabels, KeepPairs, ScenarioStep, Subsample, Unpair
from modis_dist.data import hash_order
from modis_dist.data.store.index import UNLABELLED, Index, Rows, Strings
from modis_dist.runtime.errors import ConfigError, nearest
from modis_dist.runtime.text import shown

Selected = dict[str, "TrainingRows"]


@dataclass(frozen=True)
class TrainingRows:
    """The training rows of one modality: arrays of shape [n]."""

    rows: Rows  # sorted positions in the modality's index
    label: Rows  # code of the class, UNLABELLED (-1) if unknown or hidden


def apply(
    steps: Sequence[ScenarioStep],
    indexes: Mapping[str, Index],
    rows: Mapping[str, Rows],
    *,
    classes: Sequence[str],
    seed: int,
) -> Selected:
    """Apply the steps in order to sorted ``rows``; return the training rows of every modality.

    ``seed`` applies to steps without one. A class or pair with fewer rows than the number to keep keeps all of them.
    Raises ``ConfigError`` with all unknown classes and modalities, and for modalities without training rows.
    """
    _check_names(steps, sorted(indexes), list(classes))
    selected = {name: TrainingRows(rows[name], index.label[rows[name]]) for name, index in indexes.items()}
    for step in steps:
        step_seed = None if isinstance(step, DropPairs) else step.seed
        key = (step.kind, seed if step_seed is None else step_seed)
        if isinstance(step, Unpair):
            selected = _unpaired(selected, indexes, classes, key)
        else:
            selected = {
                name: _subsampled(step, name, indexes[name], training, classes, key)
                for name, training in selected.items()
            }
    empty = [shown(name) for name, training in selected.items() if len(training.rows) == 0]
    if empty:
        raise ConfigError([f"scenario: no training rows left in modality {name}" for name in empty], source="run")
    return selected


def absent_pairs(
    selected: Mapping[str, TrainingRows], indexes: Mapping[str, Index], *, classes: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the (class, modality) pairs without training rows; rows with a hidden label count towards their class."""
    present = {name: set(indexes[name].label[training.rows].tolist()) for name, training in selected.items()}
    return [(label, name) for code, label in enumerate(classes) for name in selected if code not in present[name]]


# --- steps that keep a number of rows or labels per class and modality ------------------------------------------

QuotaStep = HideLabels | CutClass | DropPairs | KeepPairs | Subsample
Key = tuple[str, int]


def _subsampled(
    step: QuotaStep, modality: str, index: Index, training: TrainingRows, classes: Sequence[str], key: Key
) -> TrainingRows:
    """Apply a step that handles every class of every modality separately."""
    ids = index.sample_id[training.rows]
    if isinstance(step, HideLabels):
        label = training.label.copy()
        label[_beyond_quota(step, modality, ids, training.label, classes, key)] = UNLABELLED
        return replace(training, label=label)
    keep = np.ones(len(training.rows), dtype=bool)
    keep[_beyond_quota(step, modality, ids, index.label[training.rows], classes, key)] = False
    return TrainingRows(training.rows[keep], training.label[keep])


def _beyond_quota(step: QuotaStep, modality: str, ids: Strings, label: Rows, classes: Sequence[str], key: Key) -> Rows:
    """Return the positions of the rows that lose their label or are removed."""
    removed = [np.empty(0, dtype=np.int64)]
    for code in np.unique(label):
        name = None if code == UNLABELLED else classes[code]
        members = np.flatnonzero(label == code)
        rank = hash_order.ranks(ids[members], key=hash_order.key_of(*key, modality, name))
        removed.append(members[rank >= _quota(step, modality, name, len(members))])
    return np.concatenate(removed)


def _quota(step: QuotaStep, modality: str, label: str | None, count: int) -> int:
    """Return how many of ``count`` rows (hide_labels: labels) of a class in a modality are kept."""
    match step:
        case HideLabels():
            applies = label is not None and _includes(step.classes, label) and _includes(step.modalities, modality)
            quota = step.keep if step.fraction is None else count - _rounded(step.fraction, count)
        case CutClass():
            applies, quota = label == step.label, step.rows
        case DropPairs() | KeepPairs():
            applies = any((pair.label, pair.modality) == (label, modality) for pair in step.pairs)
            quota = step.rows if isinstance(step, KeepPairs) else 0
        case Subsample():
            applies = _includes(step.modalities, modality)
            quota = step.rows if step.fraction is None else _rounded(step.fraction, count)
    assert quota is not None, "the configuration requires one of the two"
    return quota if applies else count


def _rounded(fraction: float, count: int) -> int:
    """Return ``fraction * count`` in decimal arithmetic, rounded half up: 0.145 of 100 is 15."""
    return int((Decimal(repr(fraction)) * count).to_integral_value(ROUND_HALF_UP))


def _includes(names: tuple[str, ...] | None, name: str) -> bool:
    return names is None or name in names


# --- unpair -----------------------------------------------------------------------------------------------------


def _unpaired(selected: Selected, indexes: Mapping[str, Index], classes: Sequence[str], key: Key) -> Selected:
    """Keep one modality of every sample, so that the modalities of a class get numbers of rows as equal as possible."""
    names = list(selected)
    sizes = [len(selected[name].rows) for name in names]
    ids, sample = np.unique(
        np.concatenate([indexes[name].sample_id[selected[name].rows] for name in names]), return_inverse=True
    )
    modality = np.repeat(np.arange(len(names)), sizes)
    has = np.zeros((len(ids), len(names)), dtype=bool)
    has[sample, modality] = True
    label = np.full(len(ids), UNLABELLED, dtype=np.int64)
    np.maximum.at(label, sample, np.concatenate([indexes[name].label[selected[name].rows] for name in names]))
    keeps = np.empty(len(ids), dtype=np.int64)
    for code in np.unique(label):
        members = np.flatnonzero(label == code)
        part = hash_order.key_of(*key, None if code == UNLABELLED else classes[code])
        keeps[members] = _one_modality_each(ids[members], has[members], names, key=part)
    masks = np.split(keeps[sample] == modality, np.cumsum(sizes)[:-1])
    return {
        name: TrainingRows(training.rows[mask], training.label[mask])
        for (name, training), mask in zip(selected.items(), masks, strict=True)
    }


def _one_modality_each(ids: Strings, has: NDArray[np.bool_], names: list[str], *, key: str) -> Rows:
    """Return the modality that each sample of one class keeps, shape [samples]; ``has`` is [samples, modalities]."""
    # The modality that gets a remaining row differs between classes.
    order = np.argsort(hash_order.ranks(np.array(names, dtype=object), key=key))
    patterns, pattern = np.unique(has[:, order], axis=0, return_inverse=True)
    counts = np.bincount(pattern, minlength=len(patterns))
    shares = _balanced(patterns, counts)
    rank = hash_order.ranks(ids, key=key)
    keeps = np.empty(len(ids), dtype=np.int64)
    for number, share in enumerate(shares):
        members = np.flatnonzero(pattern == number)
        keeps[members[np.argsort(rank[members])]] = np.repeat(order, share)
    return keeps


def _balanced(patterns: NDArray[np.bool_], counts: Rows) -> Rows:
    """Return the samples per pattern and modality, shape [patterns, modalities], with the most balanced totals.

    Each pattern is first divided evenly; then samples move along paths from larger to smaller modalities until no path
    connects totals that differ by two or more, which is optimal (Harvey et al. 2006, semi-matchings).
    """
    shares = np.zeros(patterns.shape, dtype=np.int64)
    for number, count in enumerate(counts):
        allowed = np.flatnonzero(patterns[number])
        shares[number, allowed] = count // len(allowed)
        smallest = allowed[np.argsort(shares[:, allowed].sum(axis=0), kind="stable")]
        shares[number, smallest[: count % len(allowed)]] += 1
    while path := _uneven_path(patterns, shares):
        total = shares.sum(axis=0)
        samples = (total[path[0].source] - total[path[-1].target]) // 2
        samples = min(samples, *(shares[move.pattern, move.source] for move in path))
        for move in path:
            shares[move.pattern, move.source] -= samples
            shares[move.pattern, move.target] += samples
    return shares


class _Move(NamedTuple):
    pattern: int
    source: int
    target: int


def _uneven_path(patterns: NDArray[np.bool_], shares: Rows) -> list[_Move]:
    """Return a shortest path of moves that balances two totals, or an empty list."""
    total = shares.sum(axis=0)
    for start in np.argsort(-total, kind="stable"):
        path: dict[int, list[_Move]] = {int(start): []}
        queue = [int(start)]
        for node in queue:
            if total[start] - total[node] >= 2:
                return path[node]
            for move in _moves(patterns, shares, node):
                if move.target not in path:
                    path[move.target] = [*path[node], move]
                    queue.append(move.target)
    return []


def _moves(patterns: NDArray[np.bool_], shares: Rows, source: int) -> Iterator[_Move]:
    for number in np.flatnonzero(shares[:, source]):
        yield from (_Move(int(number), source, int(target)) for target in np.flatnonzero(patterns[number]))


# --- names ------------------------------------------------------------------------------------------------------


def _check_names(steps: Sequence[ScenarioStep], modalities: list[str], classes: list[str]) -> None:
    known = {"class": classes, "modality": modalities}
    problems = [
        f"{key}: unknown {what} {shown(name)!r}{_hint(name, known[what])}"
        for number, step in enumerate(steps)
        for key, what, name in _mentioned(f"scenario[{number}]", step)
        if name not in known[what]
    ]
    if problems:
        raise ConfigError(problems, source="run")


def _hint(name: str, known: list[str]) -> str:
    return nearest(name, known) or f"; known: {shown(', '.join(known))}"


def _mentioned(key: str, step: ScenarioStep) -> Iterator[tuple[str, str, str]]:
    """Yield (key, "class" or "modality", name) for every name in a step."""
    match step:
        case CutClass():
            yield f"{key}.label", "class", step.label
        case DropPairs() | KeepPairs():
            for number, pair in enumerate(step.pairs):
                yield f"{key}.pairs[{number}].label", "class", pair.label
                yield f"{key}.pairs[{number}].modality", "modality", pair.modality
        case HideLabels() | Subsample():
            for number, name in enumerate(step.modalities or ()):
                yield f"{key}.modalities[{number}]", "modality", name
            for number, name in enumerate((step.classes if isinstance(step, HideLabels) else None) or ()):
                yield f"{key}.classes[{number}]", "class", name
