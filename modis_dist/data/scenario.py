"""What a scenario makes of the training rows: which are used and whose label is seen. Never touches other rows.

Rows are chosen by rank of a keyed hash of their sample id, so counts are exact, levels nest (rows kept at 10 % are
among those kept at 50 %) and nothing depends on the order of rows. A share of n rows is rounded half up. Classes are
those of the store: a row whose label was hidden still belongs to its class for the steps that follow.
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
from modis_dist.runtime.errors import ConfigError, nearest, shown

Selected = dict[str, "TrainingRows"]


@dataclass(frozen=True)
class TrainingRows:
    """The training rows of one modality, both arrays of shape [n]."""

    rows: Rows  # sorted positions into the modality's index
    label: Rows  # code of the class, UNLABELLED (-1) where unknown or hidden


def apply(
    steps: Sequence[ScenarioStep],
    indexes: Mapping[str, Index],
    rows: Mapping[str, Rows],
    *,
    classes: Sequence[str],
    seed: int,
) -> Selected:
    """The training rows of every modality after all steps, in their order; ``seed`` serves steps without their own.

    A class or pair with fewer rows than are to be kept keeps all of them. Raises ``ConfigError`` for unknown classes
    and modalities (all of them at once), and where a modality is left without training rows.
    """
    _check_names(steps, sorted(indexes), list(classes))
    selected = {name: _all_rows(index, rows[name]) for name, index in indexes.items()}
    for step in steps:
        own = None if isinstance(step, DropPairs) else step.seed
        key = (step.kind, seed if own is None else own)
        if isinstance(step, Unpair):
            selected = _unpaired(selected, indexes, classes, key)
        else:
            selected = {
                name: _thinned(step, name, indexes[name], held, classes, key) for name, held in selected.items()
            }
    empty = [shown(name) for name, held in selected.items() if len(held.rows) == 0]
    if empty:
        raise ConfigError([f"scenario: leaves modality {name} without training rows" for name in empty], source="run")
    return selected


def absent_pairs(
    selected: Mapping[str, TrainingRows], indexes: Mapping[str, Index], *, classes: Sequence[str]
) -> list[tuple[str, str]]:
    """(class, modality) without a training row of that class; rows with a hidden label count as there."""
    there = {name: set(indexes[name].label[held.rows].tolist()) for name, held in selected.items()}
    return [(label, name) for code, label in enumerate(classes) for name in selected if code not in there[name]]


def _all_rows(index: Index, rows: Rows) -> TrainingRows:
    ordered = np.sort(np.asarray(rows, dtype=np.int64))
    return TrainingRows(ordered, index.label[ordered].astype(np.int64))


# --- steps that keep so many rows, or labels, of a class in a modality ------------------------------------------

Thinning = HideLabels | CutClass | DropPairs | KeepPairs | Subsample
Key = tuple[str, int]


def _thinned(
    step: Thinning, modality: str, index: Index, held: TrainingRows, classes: Sequence[str], key: Key
) -> TrainingRows:
    """The rows after one step that looks at each class in each modality by itself."""
    if isinstance(step, HideLabels):
        label = held.label.copy()
        label[_beyond_quota(step, modality, index.sample_id[held.rows], held.label, classes, key)] = UNLABELLED
        return replace(held, label=label)
    kept = np.ones(len(held.rows), dtype=bool)
    ids, label = index.sample_id[held.rows], index.label[held.rows]
    kept[_beyond_quota(step, modality, ids, label, classes, key)] = False
    return TrainingRows(held.rows[kept], held.label[kept])


def _beyond_quota(step: Thinning, modality: str, ids: Strings, label: Rows, classes: Sequence[str], key: Key) -> Rows:
    """Positions of the rows that the step takes (the row, or its label)."""
    taken = [np.empty(0, dtype=np.int64)]
    for code in np.unique(label):
        name = None if code == UNLABELLED else classes[code]
        members = np.flatnonzero(label == code)
        rank = hash_order.ranks(ids[members], key=hash_order.key_of(*key, modality, name))
        taken.append(members[rank >= _quota(step, modality, name, len(members))])
    return np.concatenate(taken)


def _quota(step: Thinning, modality: str, label: str | None, count: int) -> int:
    """How many of ``count`` rows (labels, for hide_labels) of a class in a modality are kept."""
    match step:
        case HideLabels():
            meant = label is not None and _names(step.classes, label) and _names(step.modalities, modality)
            kept = step.keep if step.fraction is None else count - _share(step.fraction, count)
        case CutClass():
            meant, kept = label == step.label, step.rows
        case DropPairs() | KeepPairs():
            meant = any((pair.label, pair.modality) == (label, modality) for pair in step.pairs)
            kept = step.rows if isinstance(step, KeepPairs) else 0
        case Subsample():
            meant = _names(step.modalities, modality)
            kept = step.rows if step.fraction is None else _share(step.fraction, count)
    assert kept is not None, "the configuration demands one of the two"
    return kept if meant else count


def _share(fraction: float, count: int) -> int:
    """The share as the decimal number that was written, rounded half up: 0.145 of 100 is 15."""
    return int((Decimal(repr(fraction)) * count).to_integral_value(ROUND_HALF_UP))


def _names(chosen: tuple[str, ...] | None, name: str) -> bool:
    return chosen is None or name in chosen


# --- unpair -----------------------------------------------------------------------------------------------------


def _unpaired(selected: Selected, indexes: Mapping[str, Index], classes: Sequence[str], key: Key) -> Selected:
    """Every sample keeps one of its modalities; within a class, modalities get equally many rows (within one row
    where the samples allow it, else as equal as they allow)."""
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
    kept = np.split(keeps[sample] == modality, np.cumsum(sizes)[:-1])
    masks = dict(zip(names, kept, strict=True))
    return {name: TrainingRows(held.rows[masks[name]], held.label[masks[name]]) for name, held in selected.items()}


def _one_modality_each(ids: Strings, has: NDArray[np.bool_], names: list[str], *, key: str) -> Rows:
    """The modality that each sample of one class keeps, shape [samples]; ``has`` is [samples, modalities]."""
    # Which modality gets the odd row differs from class to class.
    turn = np.argsort(hash_order.ranks(np.array(names, dtype=object), key=key))
    patterns, pattern = np.unique(has[:, turn], axis=0, return_inverse=True)
    counts = np.bincount(pattern, minlength=len(patterns))
    shares = _balanced(patterns, counts)
    rank = hash_order.ranks(ids, key=key)
    keeps = np.empty(len(ids), dtype=np.int64)
    for number, share in enumerate(shares):
        members = np.flatnonzero(pattern == number)
        keeps[members[np.argsort(rank[members])]] = np.repeat(turn, share)
    return keeps


def _balanced(patterns: NDArray[np.bool_], counts: Rows) -> Rows:
    """Samples of each pattern that keep each modality, shape [patterns, modalities]: the most even totals there are.

    Each pattern is handed out evenly; then samples are moved along paths from a fuller to an emptier modality until
    no path joins totals that differ by two or more, which is the optimum (Harvey et al. 2006, semi-matchings).
    """
    shares = np.zeros(patterns.shape, dtype=np.int64)
    for number, count in enumerate(counts):
        allowed = np.flatnonzero(patterns[number])
        shares[number, allowed] = count // len(allowed)
        emptiest = allowed[np.argsort(shares[:, allowed].sum(axis=0), kind="stable")]
        shares[number, emptiest[: count % len(allowed)]] += 1
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
    """The shortest moves that even out two totals; none if there are none."""
    total = shares.sum(axis=0)
    for start in np.argsort(-total, kind="stable"):
        path: dict[int, list[_Move]] = {int(start): []}
        queue = [int(start)]
        for here in queue:
            if total[start] - total[here] >= 2:
                return path[here]
            for move in _moves(patterns, shares, here):
                if move.target not in path:
                    path[move.target] = [*path[here], move]
                    queue.append(move.target)
    return []


def _moves(patterns: NDArray[np.bool_], shares: Rows, source: int) -> Iterator[_Move]:
    for number in np.flatnonzero(shares[:, source]):
        yield from (_Move(int(number), source, int(target)) for target in np.flatnonzero(patterns[number]))


# --- names ------------------------------------------------------------------------------------------------------


def _check_names(steps: Sequence[ScenarioStep], modalities: list[str], classes: list[str]) -> None:
    known = {"class": classes, "modality": modalities}
    problems = [
        f"{place}: unknown {what} {shown(name)!r}{_hint(name, known[what])}"
        for number, step in enumerate(steps)
        for place, what, name in _mentioned(f"scenario[{number}]", step)
        if name not in known[what]
    ]
    if problems:
        raise ConfigError(problems, source="run")


def _hint(name: str, known: list[str]) -> str:
    return nearest(name, known) or f"; known: {shown(', '.join(known))}"


def _mentioned(place: str, step: ScenarioStep) -> Iterator[tuple[str, str, str]]:
    """Every (key, class or modality, name) of a step."""
    match step:
        case CutClass():
            yield f"{place}.label", "class", step.label
        case DropPairs() | KeepPairs():
            for number, pair in enumerate(step.pairs):
                yield f"{place}.pairs[{number}].label", "class", pair.label
                yield f"{place}.pairs[{number}].modality", "modality", pair.modality
        case HideLabels() | Subsample():
            for number, name in enumerate(step.modalities or ()):
                yield f"{place}.modalities[{number}]", "modality", name
            for number, name in enumerate((step.classes if isinstance(step, HideLabels) else None) or ()):
                yield f"{place}.classes[{number}]", "class", name
