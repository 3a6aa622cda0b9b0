"""Checkpoints: folders ``step-00001200/`` of safetensors and JSON with a manifest of SHA-256 checksums.

A folder is renamed into place once all its files are on disk. The valid checkpoint with the highest step wins. A
checkpoint is deleted only after its successor was verified. No pickle is read or written.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modis_dist.runtime.errors import DataError, DiskFailed
from modis_dist.runtime.files import clear_leftovers, new_folder, remove_folder, sha256, write_json
from modis_dist.runtime.text import shown

VERSION = 4
NAME = re.compile(r"^step-(\d{8,})$")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory."""

    step: int
    tensors: Mapping[str, Tensors]  # "model" -> name -> tensor, held in model.safetensors
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below ``folder``, verify it, then remove its predecessors.

    Raises ``OSError`` if the disk is full or fails; predecessors are then kept.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    clear_leftovers(folder)
    target = folder / f"step-{checkpoint.step:08d}"
    if target.exists():
        if _is_valid(target):
            return target
        _set_aside(target)
    with new_folder(target) as temporary:
        for part, tensors in checkpoint.tensors.items():
            _write(temporary / f"{part}.safetensors", tensors)
        write_json(temporary / "state.json", dict(checkpoint.state))
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", {"version": VERSION, "step": checkpoint.step, "sha256": sums})
    damage = problem(target)
    if damage is not None:
        raise OSError(f"{target}: {damage} right after it was written; check the disk")
    return _without_older(folder, target)


def must_save(folder: Path, checkpoint: Checkpoint) -> Path:
    """``save`` a required checkpoint. Raises ``DiskFailed`` if the disk is full or fails."""
    try:
        return save(folder, checkpoint)
    except OSError as error:
        message = _save_failure(folder, checkpoint, error)
        raise DiskFailed(f"{message}; free disk space and rerun the same command") from error


def try_to_save(folder: Path, checkpoint: Checkpoint) -> Path | None:
    """``save`` an optional checkpoint; if the disk is full or fails, log a warning and return None."""
    try:
        return save(folder, checkpoint)
    except OSError as error:
        message = _save_failure(folder, checkpoint, error)
        logging.getLogger(__name__).warning("%s; training continues and saves again at the next checkpoint", message)
        return None


def _without_older(folder: Path, path: Path) -> Path:
    """Remove the predecessors of ``path``, which is valid; return it."""
    for other in _numbered(folder):
        if _step(other) < _step(path):
            remove_folder(other)
    return path


def _save_failure(folder: Path, checkpoint: Checkpoint, error: OSError) -> str:
    needed = sum(t.numel() * t.element_size() for part in checkpoint.tensors.values() for t in part.values())
    earlier = max(_numbered(folder), key=_step, default=None)
    fallback = "there is no earlier checkpoint" if earlier is None else f"{earlier.name} is kept"
    reason = error.strerror or error
    return f"{folder}: cannot save step {checkpoint.step}: {reason} ({needed:,} bytes needed); {fallback}"


def _write(path: Path, tensors: Tensors) -> None:
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # reports a full disk in its message only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def newest(folder: Path) -> Path | None:
    """Return the valid checkpoint with the highest step, to resume from; rename damaged ones above it.

    Returns None if the folder never had one. To avoid an accidental restart, raises ``DataError`` if all checkpoints
    are damaged or one has another format version, and ``DiskFailed`` if one cannot be read; nothing is changed then.
    """
    damaged: dict[Path, str] = {}
    try:
        clear_leftovers(folder)
        aside = sorted(folder.glob("step-*.bad*"))
        for candidate in sorted(_numbered(folder), key=_step, reverse=True):
            damage = _damage(candidate)
            if damage is None:
                for path in damaged:
                    _set_aside(path)
                return _without_older(folder, candidate)  # including those left by a killed process
            damaged[candidate] = damage
    except OtherVersion as error:
        raise DataError(
            f"{folder}: {error}; nothing was changed: resume with the modis_dist that wrote it, or use another output "
            "folder to start again"
        ) from None
    except OSError as error:
        where = shown(str(error.filename or folder))
        raise DiskFailed(f"{where}: {_unreadable(error)}; nothing was changed; rerun the same command") from error
    problems = [f"{path.name}: {damage}" for path, damage in damaged.items()]
    problems += [f"{path.name}: damaged" for path in aside]
    if problems:
        raise DataError(
            f"{folder}: no valid checkpoint ({'; '.join(problems)}); restore one, or use another output folder to "
            "start again"
        )
    return None


def latest(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None. Read-only: safe while a training is running.

    Raises ``DataError`` if that checkpoint cannot be used; never falls back to an older one silently.
    """
    while (path := max(_numbered(folder), key=_step, default=None)) is not None:
        damage = problem(path)
        if damage is None:
            return path
        if max(_numbered(folder), key=_step, default=None) == path:  # not just replaced by a running training
            others = sorted(other.name for other in _numbered(folder) if problem(other) is None)
            advice = f"name another checkpoint by its path ({', '.join(others)})" if others else "restore it"
            raise DataError(f"{path}: {damage}; {advice} or train again into another output folder")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises ``DataError`` if it is damaged or has another format version."""
    damage = problem(path)
    if damage is not None:
        raise DataError(f"{path}: {damage}")
    state = json.loads((path / "state.json").read_text())
    named = (path / name for name in json.loads((path / "manifest.json").read_text())["sha256"])
    try:
        tensors = {file.stem: load_file(file) for file in named if file.suffix == ".safetensors"}
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be read: {shown(str(error))}") from None
    return Checkpoint(_step(path), tensors, state)


def problem(path: Path) -> str | None:
    """Return the reason why a checkpoint folder cannot be used, or None."""
    try:
        return _damage(path)
    except OtherVersion as error:
        return str(error)
    except OSError as error:
        return _unreadable(error)


class OtherVersion(Exception):
    """A checkpoint with another format version, which may be valid."""


def _damage(path: Path) -> str | None:
    """Return the damage of a checkpoint folder, or None. Raises ``OtherVersion`` or ``OSError`` if it is unknown."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["version"] != VERSION:
            raise OtherVersion(f"format version {shown(manifest['version'])}; this program reads version {VERSION}")
        if manifest["step"] != _step(path):
            return f"the manifest is for step {shown(manifest['step'])}"
        for name, expected in manifest["sha256"].items():
            if sha256(path / Path(name).name) != expected:
                return f"{shown(name)} does not match its checksum"
        if "state.json" not in manifest["sha256"]:
            return "the manifest does not name state.json"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the manifest is not readable ({type(error).__name__})"
    return None


def _is_valid(path: Path) -> bool:
    """Return True if a checkpoint is valid. Raises ``OSError`` if it cannot be read."""
    try:
        return _damage(path) is None
    except OtherVersion:
        return False


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _numbered(folder: Path) -> list[Path]:
    """Return the checkpoint folders. Raises ``OSError`` if ``folder`` cannot be read, which ``glob`` would hide."""
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if NAME.match(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []


def _step(path: Path) -> int:
    match = NAME.match(path.name)
    if match is None:
        raise DataError(f"{path}: not a checkpoint folder (step-00000000 is expected)")
    return int(match.group(1))


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that it is kept but never loaded."""
    number = 0
    while (target := path.with_name(f"{path.name}.bad{number or ''}")).exists():
        number += 1
    path.rename(target)
