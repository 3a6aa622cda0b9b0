"""Validity rules for names, sample ids, labels, groups and splits of a store.

The writer and ``data check`` apply them to rows, so that no later join, split or count is silently wrong. Independent
of file formats.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import shown

SPLITS = ("", "train", "test")
METADATA = ("modality", "sample_id", "group_id", "label", "split")  # reserved column names of tables
_MODALITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DATE = re.compile(r"\d{1,2}-(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", re.IGNORECASE)
_SCIENTIFIC = re.compile(r"\d(\.\d+)?e\+\d+", re.IGNORECASE)
_SERIAL_DATE = re.compile(r"[34]\d{4}")
_WHOLE = re.compile(r"[+-]?\d+\.0*")
_NEGATIVE = re.compile(r"-\d+")
_FRACTION = re.compile(r"[+-]?\d*\.\d+")


def folded(name: str) -> str:
    """Normalise a name: names that differ only by case, outer spaces or Unicode composition become equal."""
    key = unicodedata.normalize("NFC", name.strip().casefold())
    return name if key == name else key


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that orders "2" before "10"."""
    parts: list[str | int] = [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]
    return parts, name


def check_modality(name: str, known: Iterable[str]) -> None:
    """Raise ``DataError`` for a modality name that is not a valid folder name or repeats a known one."""
    if not _MODALITY.fullmatch(name):
        raise DataError(
            f"modality {shown(name)!r}: a name must have 1 to 64 of the characters A-Z a-z 0-9 . _ - and start with a "
            "letter or digit; rename the file"
        )
    for other in known:
        if folded(other) == folded(name):
            raise DataError(f"modality {shown(name)!r} and {shown(other)!r} have the same name; rename one of them")


def check_features(names: Sequence[str], where: str) -> None:
    """Raise ``DataError`` for no features, and for empty, reserved or duplicate names (compared after ``folded``)."""
    if not names:
        raise DataError(
            f"{where}: no feature columns; features are all columns but sample_id, label, group_id and split"
        )
    reserved = [name for name in names if name in METADATA]
    if reserved:
        raise DataError(f"{where}: feature name {reserved[0]!r} is reserved; rename the column")
    positions: dict[str, int] = {}
    for position, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{where}: column {position + 1} has no name; add one or remove the column")
        before = positions.setdefault(folded(name), position)
        if before != position:
            raise DataError(
                f"{where}: columns {before + 1} and {position + 1} have the same name "
                f"({shown(names[before])!r}, {shown(name)!r}); rename or remove one"
            )


def converted_names(names: Sequence[str]) -> list[str]:
    """Return feature names that a spreadsheet probably converted from gene symbols: dates, serial dates, numbers."""
    mostly_numbers = 2 * sum(name.isdecimal() for name in names) > len(names)
    return [
        name
        for name in names
        if _DATE.fullmatch(name) or _SCIENTIFIC.fullmatch(name) or (not mostly_numbers and _SERIAL_DATE.fullmatch(name))
    ]


def class_name(value: object) -> str | None:
    """Return the class name of a label: integers without ``.0``, None for an empty label.

    Raises ``ValueError`` for non-integer numbers (measurements) and negative numbers (codes for missing values).
    """
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) else str(value)
    whole = isinstance(value, float) and value.is_integer()
    if whole or _WHOLE.fullmatch(text) or _NEGATIVE.fullmatch(text):
        number = int(float(text))
        if number < 0:
            raise ValueError(f"label {number} usually means unlabelled; leave the cell empty, or use a class name")
        return str(number)
    if isinstance(value, float) or _FRACTION.fullmatch(text):
        raise ValueError(f"label {shown(text)!r} is not an integer or a class name")
    return text


def check_finite(
    x: NDArray[np.float32], sample_id: Sequence[str], features: Sequence[str], where: str, *, first_row: int
) -> None:
    """Raise ``DataError`` for infinite values in rows [n, p], naming the first; NaN is a missing value."""
    infinite = np.isinf(x)
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        raise DataError(
            f"{where}, data row {first_row + row}, sample {shown(sample_id[row])!r}, feature "
            f"{shown(features[column])!r}: infinite, or beyond 3.4e38 ({infinite.sum()} such values in "
            f"{infinite.any(axis=1).sum()} of {len(x)} rows); leave missing values empty and scale large ones"
        )


@dataclass(frozen=True)
class _Sample:
    sample_id: str
    group_id: str
    label: str | None
    where: str


class Ledger:
    """Checks the rows of a store for consistency with all rows before them.

    Memory grows with the number of samples, not of features.
    """

    def __init__(self) -> None:
        self._samples: dict[str, _Sample] = {}
        self._rows: dict[str, dict[str, int]] = {}
        self._splits: dict[str, tuple[str, str]] = {}
        self.labels: set[str] = set()

    def add(
        self,
        where: str,
        *,
        sample_id: Sequence[str],
        group_id: Sequence[str],
        label: Sequence[str | None],
        split: Sequence[str],
    ) -> None:
        """Add rows of the modality that messages call ``where``. Raises ``DataError`` for the first invalid row."""
        rows = self._rows.setdefault(where, {})
        for sample, group, name, part in zip(sample_id, group_id, label, split, strict=True):
            row = f"{where}, data row {len(rows) + 1}"
            self._add_sample(rows, _Sample(sample, group, name, row))
            self._add_split(group, part, row)
        self.labels.update(name for name in label if name is not None)

    def rows(self, where: str) -> int:
        """Return the number of rows added so far."""
        return len(self._rows.get(where, ()))

    def samples(self, where: str) -> Iterable[str]:
        """Return the sample ids of one modality, in row order."""
        return self._rows[where].keys()

    def _add_sample(self, rows: dict[str, int], new: _Sample) -> None:
        if not new.sample_id or not new.group_id:
            raise DataError(f"{new.where}: sample_id is missing; add one to every row")
        if new.label == "":
            raise DataError(f"{new.where}: label is an empty string; use null for unknown classes")
        if new.sample_id in rows:
            raise DataError(
                f"{new.where}: duplicate sample_id {shown(new.sample_id)!r} (first in data row {rows[new.sample_id]}); "
                "keep one row per sample and modality"
            )
        rows[new.sample_id] = len(rows) + 1
        known = self._samples.setdefault(folded(new.sample_id), new)
        if known is not new:
            self._samples[folded(new.sample_id)] = _same_sample(known, new)

    def _add_split(self, group: str, part: str, row: str) -> None:
        if part not in SPLITS:
            raise DataError(f"{row}: split must be train, test or empty (got {shown(part)!r})")
        if not part:
            return
        known, before = self._splits.setdefault(group, (part, row))
        if known != part:
            raise DataError(
                f"{row}: split of group {shown(group)!r} is {part}, but {known} in {before}; "
                "use one split for all rows of a group"
            )


def _same_sample(known: _Sample, new: _Sample) -> _Sample:
    """Merge a sample with its row in another modality. Raises ``DataError`` for contradictory rows."""
    name = shown(new.sample_id)
    if new.sample_id != known.sample_id:
        raise DataError(
            f"{new.where}: sample_id {name!r} and {shown(known.sample_id)!r} in {known.where} differ only by case, "
            "spaces or Unicode form; use the same id for the same sample, clearly different ids otherwise"
        )
    if new.group_id != known.group_id:
        raise DataError(
            f"{new.where}: group_id of sample {name!r} is {shown(new.group_id)!r}, but {shown(known.group_id)!r} in "
            f"{known.where}; use the same group_id in every modality"
        )
    if new.label is None or new.label == known.label:
        return known
    if known.label is not None:
        raise DataError(
            f"{new.where}: label of sample {name!r} is {shown(new.label)!r}, but {shown(known.label)!r} in "
            f"{known.where}; correct one of them"
        )
    return replace(known, label=new.label, where=new.where)
