"""Which rows are test, validation and training rows. Whole groups (patients) are drawn, over all modalities at once.

A draw is a pure function of the ids, labels and the seed, not of the order of rows or modalities. It must not know
features, scenarios or models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.run import Split
from modis_dist.data import hash_order
from modis_dist.data.store.index import UNLABELLED, Index, Rows, Strings
from modis_dist.runtime.errors import DataError, shown

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Partition:
    """Positions into one modality's index: int64, sorted, disjoint, together all rows."""

    train: Rows
    validation: Rows
    test: Rows


def partition(indexes: Mapping[str, Index], split: Split, *, classes: Sequence[str] = ()) -> dict[str, Partition]:
    """The rows of every modality by their use; ``classes`` only names classes in messages.

    Raises ``DataError``: a stored split that cuts a group or holds no test row; a class with fewer training groups
    than folds; a modality left without training rows.
    """
    cohort = _Cohort.of(indexes)
    test = _test_groups(cohort, indexes, split)
    validation = _validation_groups(cohort, ~test, split, classes)
    parts = {name: _rows(cohort.group_of_row[name], test, validation) for name in indexes}
    for name, part in parts.items():
        if len(part.train) == 0:
            drawn = f"{len(part.test)} test and {len(part.validation)} validation rows of {len(indexes[name])}"
            raise DataError(f"modality {shown(name)}: has no training rows left ({drawn}); change data.split")
    return parts


def _rows(group: Rows, test: Mask, validation: Mask) -> Partition:
    held_out = test | validation
    return Partition(*(np.flatnonzero(mask[group]) for mask in (~held_out, validation, test)))


# --- groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cohort:
    """The groups of all modalities, numbered, and the cells that they have to be balanced in.

    A cell is a count that every side of a split must get its share of: rows of a class in a modality, rows of a
    modality, groups of a class, groups. ``member`` and ``cell`` are parallel: a group stands once for each unit that
    it brings to a cell.
    """

    names: Strings  # [groups], sorted
    group_of_row: Mapping[str, Rows]
    member: Rows
    cell: Rows
    class_of_cell: Mapping[int, int]  # the cells that count groups of a class

    @classmethod
    def of(cls, indexes: Mapping[str, Index]) -> "_Cohort":
        modalities = sorted(indexes)  # the order of sums could decide between equals
        joined = np.concatenate([indexes[name].group_id for name in modalities])
        names, group = np.unique(joined, return_inverse=True)
        sizes = [len(indexes[name]) for name in modalities]
        label = np.concatenate([indexes[name].label for name in modalities]) - UNLABELLED
        width = int(label.max(initial=0)) + 1
        modality = np.repeat(np.arange(len(modalities)), sizes)
        rows = np.stack([group, modality * width + label])
        first = len(modalities) * width
        groups_of_class = np.unique(np.stack([group, first + label]), axis=1)
        groups = np.stack([np.arange(len(names)), np.full(len(names), first + width)])
        rows_of_modality = np.stack([group, first + width + 1 + modality])
        cells = [rows, rows_of_modality, groups_of_class, groups]
        member, cell = np.concatenate(cells, axis=1).astype(np.int64)
        per_modality = np.split(group.astype(np.int64), np.cumsum(sizes)[:-1])
        class_of_cell = {first + code: code + UNLABELLED for code in range(width)}
        return cls(names, dict(zip(modalities, per_modality, strict=True)), member, cell, class_of_cell)


def _test_groups(cohort: _Cohort, indexes: Mapping[str, Index], split: Split) -> Mask:
    everyone = np.ones(len(cohort.names), dtype=bool)
    match split.test:
        case "stored":
            return _stored_test_groups(cohort, indexes)
        case "stratified":
            shares = (split.test_fraction, 1 - split.test_fraction)
            return _bin(cohort, everyone, shares, 0, key=hash_order.key_of("split", "test", split.seed))
        case "none":
            return ~everyone


def _stored_test_groups(cohort: _Cohort, indexes: Mapping[str, Index]) -> Mask:
    test, other = (np.zeros(len(cohort.names), dtype=bool) for _ in range(2))
    for name, index in indexes.items():
        is_test = index.split == "test"
        group = cohort.group_of_row[name]
        test[group[is_test]] = True
        other[group[~is_test]] = True
    cut = np.flatnonzero(test & other)
    if len(cut):
        first = shown(cohort.names[cut[0]])
        raise DataError(f"split: {len(cut)} groups have test and training rows (first: {first}); mend the split column")
    if not test.any():
        raise DataError("split: no row is marked 'test'; set data.split.test to stratified or none")
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
                f"class {name}: has {counts[cell]} groups to divide into {folds} folds; lower the number of folds"
            )


# --- the draw -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stratum:
    """Groups that bring the same units to the same cells, so that it is all the same which of them is drawn."""

    groups: Rows  # in the order in which they are drawn
    cells: Rows
    units: NDArray[np.float64]  # brought to each of the cells by one group


def _draw(cohort: _Cohort, among: Mask, shares: Sequence[float], *, key: str) -> Rows:
    """The bin of every group, shape [groups], -1 for those not ``among``: bin b gets ``shares[b]`` of every cell.

    How many groups of a stratum go to which bin is settled by rounding down, then giving each group left over to the
    bin that its cells lack most, then moving groups while that lessens the sum of squared errors over cells and
    bins. Which groups they are is settled by their keyed hash.
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
    """The strata of some groups; strata and their groups in the order of the keyed hash."""
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
    for signature, found in members.items():
        cells, units = np.unique(np.frombuffer(signature, dtype=np.int64), return_counts=True)
        strata.append(_Stratum(np.array(found, dtype=np.int64), cells, units.astype(np.float64)))
    return strata


def _targets(cohort: _Cohort, among: Mask, shares: Sequence[float]) -> NDArray[np.float64]:
    """What every bin should get of every cell, shape [cells, bins]."""
    total = np.bincount(cohort.cell[among[cohort.member]], minlength=int(cohort.cell.max(initial=0)) + 1)
    targets: NDArray[np.float64] = np.outer(total, shares)
    return targets


def _rounded_down(stratum: _Stratum, shares: Sequence[float], lacking: NDArray[np.float64]) -> Rows:
    """Groups per bin, shape [bins]; takes what they bring from ``lacking``."""
    count = np.floor(len(stratum.groups) * np.asarray(shares) + 1e-9).astype(np.int64)
    lacking[stratum.cells] -= np.outer(stratum.units, count)
    return count


def _move(stratum: _Stratum, count: Rows, lacking: NDArray[np.float64], *, to: int) -> None:
    count[to] += 1
    lacking[stratum.cells, to] -= stratum.units


def _improve(stratum: _Stratum, count: Rows, lacking: NDArray[np.float64]) -> bool:
    """Move one group of the stratum to a better bin; False if there is none."""
    need = stratum.units @ lacking[stratum.cells]
    source = int(np.argmin(np.where(count > 0, need, np.inf)))
    target = int(np.argmax(need))
    if need[target] - need[source] <= stratum.units @ stratum.units + 1e-9:
        return False
    count[source] -= 1
    lacking[stratum.cells, source] += stratum.units
    _move(stratum, count, lacking, to=target)
    return True
