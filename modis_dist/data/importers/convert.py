"""Import of a folder of tables, an AnnData or a MuData file into a store, in bounded memory.

Finds the files, calls their readers and converts ids, labels and splits. Formats belong to the readers, rules to the
writer. Nothing is joined, renamed or dropped implicitly.
"""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from modis_dist.data.importers import anndata_files, tables
from modis_dist.data.importers.import_source import Piece, Source
from modis_dist.data.store.coverage import Progress
from modis_dist.data.store.rules import check_features, check_modality, class_name, natural_order
from modis_dist.data.store.writer import StoreWriter
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import listed, shown

READERS: Mapping[str, Callable[[Path, str], list[Source]]] = {
    ".parquet": tables.parquet,
    ".csv": partial(tables.text, delimiter=","),
    ".csv.gz": partial(tables.text, delimiter=","),
    ".tsv": partial(tables.text, delimiter="\t"),
    ".tsv.gz": partial(tables.text, delimiter="\t"),
    ".h5ad": anndata_files.h5ad,
    ".h5mu": anndata_files.h5mu,
}
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload", ".download", "~")
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file with `git lfs pull`",
    b"<!doctype html": "an HTML page; the download failed",
    b"<html": "an HTML page; the download failed",
    b"par1": "a Parquet file; rename it to .parquet",
    b"\x1f\x8b": "gzip-compressed; rename it to .gz",
    b"pk\x03\x04": "a ZIP archive or a spreadsheet; extract it or save it as CSV",
    b"\x89hdf\r\n\x1a\n": "an HDF5 file; rename it to .h5ad or .h5mu",
}
_MAGIC: Mapping[str, tuple[bytes, ...]] = {
    ".parquet": (b"par1",),
    ".h5ad": (b"\x89hdf",),
    ".h5mu": (b"\x89hdf", b"mudata"),
    ".csv.gz": (b"\x1f\x8b",),
    ".tsv.gz": (b"\x1f\x8b",),
}


def import_source(source: Path, out: Path, *, progress: Progress) -> None:
    """Write a store at ``out`` from a folder of ``<modality>.parquet|csv|tsv[.gz]|h5ad`` or one such file or ``.h5mu``.

    Tables need the columns ``sample_id`` and ``label`` and may have ``group_id`` and ``split``; others are features.
    Raises ``DataError`` for the first problem and then leaves nothing at ``out``. The store's notices list suspicious
    but valid input.
    """
    files, ignored = _files(source)
    sources = _opened(files)
    names = {modality.modality: modality.where for modality in sources}
    record = {"kind": "import", "path": str(source.absolute()), "files": names}
    with StoreWriter(out, source=record) as writer:
        if ignored:
            writer.note(f"ignored: {listed(ignored)}")
        for modality in sources:
            _import(modality, writer, progress)


def _import(source: Source, writer: StoreWriter, progress: Progress) -> None:
    writer.begin(source.modality, source.features, where=source.where)
    row = 1
    for piece in source.pieces(writer.folder):
        sample_id, group_id, label, split = _meta(piece, source.where, row)
        writer.write(source.modality, sample_id=sample_id, group_id=group_id, label=label, split=split, x=piece.x)
        row += len(sample_id)
        progress(source.modality, piece.done, piece.total)


def _meta(piece: Piece, where: str, first_row: int) -> tuple[list[str], list[str], list[str | None], list[str]]:
    """Return ids, groups, labels and splits as in a store; a row without group_id forms its own group."""
    rows = len(piece.x)
    sample_id = [value or "" for value in _texts(piece.meta["sample_id"], "sample_id", where, first_row)]
    groups = _texts(piece.meta.get("group_id", [None] * rows), "group_id", where, first_row)
    splits = _texts(piece.meta.get("split", [None] * rows), "split", where, first_row)
    labels: list[str | None] = []
    for value in piece.meta["label"]:
        try:
            labels.append(class_name(value))
        except ValueError as error:
            raise DataError(f"{where}, data row {first_row + len(labels)}: {error}") from None
    grouped = [group or sample for group, sample in zip(groups, sample_id, strict=True)]
    return sample_id, grouped, labels, [split or "" for split in splits]


def _texts(values: Sequence[object], column: str, where: str, first_row: int) -> list[str | None]:
    """Convert ids to text. Raises ``DataError`` for floats, whose text representation is ambiguous."""
    texts: list[str | None] = []
    for value in values:
        if value is None or isinstance(value, str):
            texts.append(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            texts.append(str(value))
        elif value != value:
            texts.append(None)
        else:
            raise DataError(
                f"{where}, data row {first_row + len(texts)}: {column} is a {type(value).__name__} ({shown(value)}); "
                "convert it to text"
            )
    return texts


# --- finding files --------------------------------------------------------------------------------------------


def _files(source: Path) -> tuple[list[Path], list[str]]:
    """Return the files to read, in natural order, and the names of the ignored files."""
    try:
        if not source.is_dir():
            if not os.path.lexists(source):
                raise DataError(f"{shown(str(source))}: does not exist")
            if _suffix(source) is None:
                raise DataError(
                    f"{shown(str(source))}: unknown format; expected a folder or a file of type {', '.join(READERS)}"
                )
            return [source], []
        entries = sorted(source.iterdir(), key=lambda path: natural_order(path.name))
    except OSError as error:
        raise DataError(f"{shown(str(source))}: cannot be read ({error.strerror})") from error
    visible = [path for path in entries if not path.name.startswith(".")]
    for path in visible:
        if path.name.lower().endswith(_UNFINISHED):
            raise DataError(f"{shown(str(path))}: incomplete copy or download; complete or remove it")
    files = [path for path in visible if _suffix(path)]
    if not files:
        raise DataError(f"{shown(str(source))}: no tables found; expected <modality>{', <modality>'.join(READERS)}")
    return files, [path.name for path in visible if not _suffix(path)]


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def _opened(files: list[Path]) -> list[Source]:
    """Return the modalities of all files; checks all headers before the first row is read."""
    sources: list[Source] = []
    for path in files:
        suffix = _suffix(path)
        assert suffix is not None
        _refuse_foreign(path, suffix)
        sources += READERS[suffix](path, path.name[: -len(suffix)])
    for number, source in enumerate(sources):
        check_modality(source.modality, [other.modality for other in sources[:number]])
        check_features(source.features, source.where)
    return sources


def _refuse_foreign(path: Path, suffix: str) -> None:
    """Raise ``DataError`` for files that are not regular or have the magic bytes of another format."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{shown(str(path))}: not a regular file")
        with path.open("rb") as file:
            head = file.read(64).lower()
    except OSError as error:
        raise DataError(f"{shown(str(path))}: cannot be read ({error.strerror})") from error
    if not head:
        raise DataError(f"{shown(str(path))}: empty file")
    expected = _MAGIC.get(suffix)
    if expected and head.startswith(expected):
        return
    for magic, what in _FOREIGN.items():
        if head.lstrip().startswith(magic):
            raise DataError(f"{shown(str(path))}: {what}")
    if expected:
        raise DataError(f"{shown(str(path))}: not a {suffix} file (wrong magic bytes); damaged or of another format")
