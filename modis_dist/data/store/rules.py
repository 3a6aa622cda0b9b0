"""What must hold of the names, sample ids, labels, groups and splits of a store, whoever writes it.

Knows no file format: the writer and ``check`` feed it rows, and it refuses what would later be joined, split or
counted wrongly without anybody noticing.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from modis_dist.runtime.errors import DataError, shown

SPLITS = ("", "train", "test")
METADATA = ("modality", "sample_id", "group_id", "label", "split")  # columns of tables that are read or written
_MODALITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DATE = re.compile(r"\d{1,2}-(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", re.IGNORECASE)
_SCIENTIFIC = re.compile(r"\d(\.\d+)?e\+\d+", re.IGNORECASE)
_SERIAL_DATE = re.compile(r"[34]\d{4}")
_WHOLE = re.compile(r"[+-]?\d+\.0*")
_NEGATIVE = re.compile(r"-\d+")
_FRACTION = re.compile(r"[+-]?\d*\.\d+")


def folded(name: str) -> str:
    """The form in which two names that differ only by case, outer spaces or Unicode composition are equal."""
    key = unicodedata.normalize("NFC", name.strip().casefold())
    return name if key == name else key


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts "2" before "10"."""
    parts: list[str | int] = [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]
    return parts, name


def check_modality(name: str, known: Iterable[str]) -> None:
    """Refuse a modality name that cannot be a folder's, or that another one has in other letters."""
    if not _MODALITY.fullmatch(name):
        raise DataError(
            f"modality {shown(name)!r}: a name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and starts with a "
            "letter or digit; rename the file"
        )
    for other in known:
        if folded(other) == folded(name):
            raise DataError(f"modality {shown(name)!r} and {shown(other)!r} have the same name; rename one of them")


def check_features(names: Sequence[str], where: str) -> None:
    """Refuse an empty list, empty names and names that occur twice (also after case, spaces and composition)."""
    if not names:
        raise DataError(
            f"{where}: there are no feature columns; every column but sample_id, label, group_id and split is one"
        )
    reserved = [name for name in names if name in METADATA]
    if reserved:
        raise DataError(f"{where}: no feature may be called {reserved[0]!r}, which our tables use; rename the column")
    first: dict[str, int] = {}
    for position, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{where}: column {position + 1} has no name; name it or remove it")
        before = first.setdefault(folded(name), position)
        if before != position:
            raise DataError(
                f"{where}: columns {before + 1} and {position + 1} have the same name "
                f"({shown(names[before])!r}, {shown(name)!r}); rename or remove one"
            )


def spoilt_names(names: Sequence[str]) -> list[str]:
    """Feature names that look like what a spreadsheet made of a gene symbol: dates, serial dates, rounded numbers."""
    mostly_numbers = 2 * sum(name.isdecimal() for name in names) > len(names)
    return [
        name
        for name in names
        if _DATE.fullmatch(name) or _SCIENTIFIC.fullmatch(name) or (not mostly_numbers and _SERIAL_DATE.fullmatch(name))
    ]


def class_name(value: object) -> str | None:
    """The class that a label of a source means: whole numbers without ``.0``, None for an empty label.

    Raises ``ValueError`` for a number that is not whole (a measurement) or below 0 (a code): neither is a class.
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
            raise ValueError(f"label {number} usually means unlabelled; leave it empty, or give the class a name")
        return str(number)
    if isinstance(value, float) or _FRACTION.fullmatch(text):
        raise ValueError(f"label {shown(text)!r} is a number that is not whole; a label names a class")
    return text


@dataclass(frozen=True)
class _Sample:
    sample_id: str
    group_id: str
    label: str | None
    where: str


class Ledger:
    """Remembers the samples of a store as they are added and refuses what contradicts them.

    Memory grows with the number of samples, not with their features.
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
        """Add the next rows of the modality that messages call ``where``. Raises ``DataError`` at the first mistake."""
        rows = self._rows.setdefault(where, {})
        for sample, group, name, part in zip(sample_id, group_id, label, split, strict=True):
            here = f"{where}, data row {len(rows) + 1}"
            self._add_sample(rows, _Sample(sample, group, name, here))
            self._add_split(group, part, here)
        self.labels.update(name for name in label if name is not None)

    def rows(self, where: str) -> int:
        """Rows added so far."""
        return len(self._rows.get(where, ()))

    def samples(self, where: str) -> Iterable[str]:
        """Sample ids of one modality, in row order."""
        return self._rows[where].keys()

    def _add_sample(self, rows: dict[str, int], new: _Sample) -> None:
        if not new.sample_id or not new.group_id:
            raise DataError(f"{new.where}: sample_id is missing; every row needs one")
        if new.label == "":
            raise DataError(f"{new.where}: the label is empty text; leave it out where the class is unknown")
        if new.sample_id in rows:
            first = rows[new.sample_id]
            raise DataError(
                f"{new.where}: sample {shown(new.sample_id)!r} stands in data row {first} already; "
                "keep one row per sample and modality"
            )
        rows[new.sample_id] = len(rows) + 1
        known = self._samples.setdefault(folded(new.sample_id), new)
        if known is not new:
            self._samples[folded(new.sample_id)] = _same_sample(known, new)

    def _add_split(self, group: str, part: str, here: str) -> None:
        if part not in SPLITS:
            raise DataError(f"{here}: split must be train, test or empty (got {shown(part)!r})")
        if not part:
            return
        known, before = self._splits.setdefault(group, (part, here))
        if known != part:
            raise DataError(
                f"{here}: group {shown(group)!r} is in {part} here and in {known} at {before}; "
                "all rows of a group belong to one side"
            )


def _same_sample(known: _Sample, new: _Sample) -> _Sample:
    """What is known of a sample after its row in another modality; refuses rows that contradict each other."""
    name = shown(new.sample_id)
    if new.sample_id != known.sample_id:
        raise DataError(
            f"{new.where}: sample id {name!r} and {shown(known.sample_id)!r} at {known.where} differ only by case, "
            "spaces or Unicode form; write the same sample the same way, different ones differently"
        )
    if new.group_id != known.group_id:
        raise DataError(
            f"{new.where}: sample {name!r} has group {shown(new.group_id)!r} here and {shown(known.group_id)!r} at "
            f"{known.where}; give its group_id in every modality"
        )
    if new.label is None or new.label == known.label:
        return known
    if known.label is not None:
        raise DataError(
            f"{new.where}: sample {name!r} has label {shown(new.label)!r} here and {shown(known.label)!r} at "
            f"{known.where}; correct one of them"
        )
    return replace(known, label=new.label, where=new.where)
