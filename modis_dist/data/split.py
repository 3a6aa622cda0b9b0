"""Split into training, validation and test rows by whole groups (patients), over all modalities at once.

A split is a pure function of ids, labels and seed; the order of rows and modalities does not matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.run import Split
from modis_dist.data import hash_order
from modis_dist.data.store.index import UNLABELLED, Index, Rows, Strings
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import listed, shown

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Partition:
    """Positions in one modality's index: int64, sorted, disjoint, together all rows."""

    train: Rows
    validation: Rows
    test: Rows


def partition(indexes: Mapping[str, Index], split: Split, *, classes: Sequence[str] = ()) -> dict[str, Partition]:
    """Split the rows of every modality; ``classes`` are the class names for messages.

    Raises ``DataError`` for a stored split that divides a group or has no test rows, a class with fewer training groups
    than folds, and a modality without training rows.
    """
    cohort = _Cohort.of(indexes)
    test = _test_groups(cohort, indexes, split)
    validation = _validation_groups(cohort, ~test, split, classes)
    masks = (~(test | validation), validation, test)
    parts = {name: Partition(*(np.flatnonzero(mask[cohort.group_of_row[name]]) for mask in masks)) for name in indexes}
    for name, part in parts.items():
        if len(part.train) == 0:
            counts = f"{len(part.test)} test and {len(part.validation)} validation rows of {len(indexes[name])}"
            raise DataError(f"data.split: modality {shown(name)} has no training rows ({counts}); change the fractions")
    return parts


# --- groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cohort:
    """The numbered groups of all modalities, and the cells over which a split is balanced.

    A cell is a count that a split divides proportionally: rows of a class in a modality, rows of a modality, groups of
    a class, or groups. ``member`` and ``cell`` are parallel: one entry per unit that a group adds to a cell.
    """

    names: Strings  # [groups], sorted
    group_of_row: Mapping[str, Rows]
    member: Rows
    cell: Rows
    class_of_cell: Mapping[int, int]  # of the cells that count groups of a class

    @classmethod
    def of(cls, indexes: Mapping[str, Index]) -> "_Cohort":
        modalities = sorted(indexes)  # ties must not depend on the order of the modalities
        group_ids = np.concatenate([indexes[name].group_id for name in modalities])
        names, group = np.unique(group_ids, return_inverse=True)
        sizes = [len(indexes[name]) for name in modalities]
        label = np.concatenate([indexes[name].label for name in modalities]) - UNLABELLED
        width = int(label.max(initial=0)) + 1
        modality = np.repeat(np.arange(len(modalities)), sizes)
        rows = np.stack([group, modality * width + label])
        offset = len(modalities) * width
        groups_of_class = np.unique(np.stack([group, offset + label]), axis=1)
        groups = np.stack([np.arange(len(names)), np.full(len(names), offset + width)])
        rows_of_modality = np.stack([group, offset + width + 1 + modality])
        cells = [rows, rows_of_modality, groups_of_class, groups]
        member, cell = np.concatenate(cells, axis=1).astype(np.int64)
        per_modality = np.split(group.astype(np.int64), np.cumsum(sizes)[:-1])
        class_of_cell = {offset + code: code + UNLABELLED for code in range(width)}
        return cls(names, dict(zip(modalities, per_modality, strict=True)), member, cell, class_of_cell)


def _test_groups(cohort: _Cohort, indexes: Mapping[str, Index], split: Split) -> Mask:
    all_groups = np.ones(len(cohort.names), dtype=bool)
    match split.test:
        case "stored":
            return _stored_test_groups(cohort, indexes)
        case "stratified":
            shares = (split.test_fraction, 1 - split.test_fraction)
            return _bin(cohort, all_groups, shares, 0, key=hash_order.key_of("split", "test", split.seed))
        case "none":
            return ~all_groups


def _stored_test_groups(cohort: _Cohort, indexes: Mapping[str, Index]) -> Mask:
    test, other = (np.zeros(len(cohort.names), dtype=bool) for _ in range(2))
    for name, index in indexes.items():
        is_test = index.split == "test"
        group = cohort.group_of_row[name]
        test[group[is_test]] = True
        other[group[~is_test]] = True
    mixed = np.flatnonzero(test & other)
    if len(mixed):
        names = listed(list(cohort.names[mixed]))
        raise DataError(f"split: {len(mixed)} groups have test and training rows ({names}); correct the split column")
    if not test.any():
        raise DataError("split: no row has split 'test'; set data.split.test to stratified or none")
    return test


def _validation_groups(cohort: _Cohort, rest: Mask, split: Split, classes: Sequence[str]) -> Mask:
    if split.folds is not None and split.fold is not None:
        _check_folds(cohort, rest, split.folds, classes)
        shares = (1 / split.folds,) * split.folds
        return _bin(cohort, rest, shares, split.fold, key=hash_order.key_of("split", "folds", split.seed))
    shares = (split.validation_fraction, 1 - split.validation_fraction)
    return _bin(cohort, rest, shares, 0, key=hash_order.key_of("split", "validation", split.seed))


def _bin(cohort: _Cohort, among: Mask, shares: Sequence[float], number: int, *, key: str) -> Mask:
    return np.asarray(_draw(cohort, among, shares, key=key) == number)


def _check_folds(cohort: _Cohort, rest: Mask, folds: int, classes: Sequence[str]) -> None:
    counts = np.bincount(cohort.cell[rest[cohort.member]], minlength=max(cohort.class_of_cell) + 1)
    present = np.bincount(cohort.cell, minlength=max(cohort.class_of_cell) + 1)
    for cell, code in cohort.class_of_cell.items():
        if code != UNLABELLED and present[cell] and counts[cell] < folds:
            name = shown(classes[code]) if code < len(classes) else f"number {code}"
            raise DataError(
                f"folds: class {name} has {counts[cell]} training groups, fewer than {folds} folds; use fewer folds"
            )


# --- the draw -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stratum:
    """Interchangeable groups: they add the same units to the same cells."""

    groups: Rows  # in the order of the draw
    cells: Rows
    units: NDArray[np.float64]  # that one group adds to each of the cells


def _draw(cohort: _Cohort, among: Mask, shares: Sequence[float], *, key: str) -> Rows:
    """Assign groups to bins so that bin b gets ``shares[b]`` of every cell; shape [groups], -1 if not ``among``.

    The number of groups per stratum and bin is rounded down; each remaining group goes to the bin with the largest
    deficit in its cells; groups then move between bins while that decreases the sum of squared errors over cells and
    bins. A keyed hash orders the groups of a stratum.
    """
    strata = _strata(cohort, among, key)
    lacking = _targets(cohort, among, shares)
    counts = [_rounded_down(stratum, shares, lacking) for stratum in strata]
    for stratum, count in zip(strata, counts, strict=True):
        for _ in range(len(stratum.groups) - int(count.sum())):
            _move(stratum, count, lacking, to=int(np.argmax(stratum.units @ lacking[stratum.cells])))
    while sum(_improve(stratum, count, lacking) for stratum, count in zip(strata, counts, strict=True)):
        pass
    drawn = np.full(len(cohort.names), -1, dtype=np.int64)
    for stratum, count in zip(strata, counts, strict=True):
        drawn[stratum.groups] = np.repeat(np.arange(len(shares)), count)
    return drawn


def _strata(cohort: _Cohort, among: Mask, key: str) -> list[_Stratum]:
    """Return the strata of the selected groups; strata and their groups are in the order of the keyed hash."""
    chosen = among[cohort.member]
    member, cell = cohort.member[chosen], cohort.cell[chosen]
    order = np.lexsort((cell, member))
    member, cell = member[order], cell[order]
    groups, starts = np.unique(member, return_index=True)
    signatures = np.split(cell, starts[1:])
    members: dict[bytes, list[int]] = {}
    for position in np.argsort(hash_order.ranks(cohort.names[groups], key=key)):
        members.setdefault(signatures[position].tobytes(), []).append(int(groups[position]))
    strata = []
    for signature, positions in members.items():
        cells, units = np.unique(np.frombuffer(signature, dtype=np.int64), return_counts=True)
        strata.append(_Stratum(np.array(positions, dtype=np.int64), cells, units.astype(np.float64)))
    return strata


def _targets(cohort: _Cohort, among: Mask, shares: Sequence[float]) -> NDArray[np.float64]:
    """Return the target of every cell and bin, shape [cells, bins]."""
    total = np.bincount(cohort.cell[among[cohort.member]], minlength=int(cohort.cell.max(initial=0)) + 1)
    targets: NDArray[np.float64] = np.outer(total, shares)
    return targets


def _rounded_down(stratum: _Stratum, shares: Sequence[float], lacking: NDArray[np.float64]) -> Rows:
    """Return the groups per bin, rounded down, shape [bins]; subtracts their units from ``lacking``."""
    count = np.floor(len(stratum.groups) * np.asarray(shares) + 1e-9).astype(np.int64)
    lacking[stratum.cells] -= np.outer(stratum.units, count)
    return count


def _move(stratum: _Stratum, count: Rows, lacking: NDArray[np.float64], *, to: int) -> None:
    count[to] += 1
    lacking[stratum.cells, to] -= stratum.units


def _improve(stratum: _Stratum, count: Rows, lacking: NDArray[np.float64]) -> bool:
    """Move one group of the stratum to a better bin; return False if there is none."""
    need = stratum.units @ lacking[stratum.cells]
    source = int(np.argmin(np.where(count > 0, need, np.inf)))
    target = int(np.argmax(need))
    if need[target] - need[source] <= stratum.units @ stratum.units + 1e-9:
        return False
    count[source] -= 1
    lacking[stratum.cells, source] += stratum.units
    _move(stratum, count, lacking, to=target)
    return True
