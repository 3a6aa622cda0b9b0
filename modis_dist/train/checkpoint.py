"""Checkpoints: folders ``step-00001200/`` of safetensors and JSON with a manifest of SHA-256 sums.

A folder appears by one rename after everything in it is on the disk. The newest valid one wins, by step number, never
by time. Nothing is deleted before its successor has been read back. No pickle is read or written.
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
    """Write a checkpoint below ``folder``, read it back, then remove its predecessors.

    Raises ``OSError`` where the disk is full or fails; the predecessors are then still there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    clear_leftovers(folder)
    target = folder / f"step-{checkpoint.step:08d}"
    if target.exists():
        if _is_sound(target):
            return target
        _set_aside(target)
    with new_folder(target) as temporary:
        for part, tensors in checkpoint.tensors.items():
            _write(temporary / f"{part}.safetensors", tensors)
        write_json(temporary / "state.json", dict(checkpoint.state))
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", {"version": VERSION, "step": checkpoint.step, "sha256": sums})
    wrong = problem(target)
    if wrong is not None:
        raise OSError(f"{target}: {wrong} right after it was written; the disk is failing")
    return _without_older(folder, target)


def must_save(folder: Path, checkpoint: Checkpoint) -> Path:
    """``save`` for what nothing later would replace. Raises ``DiskFailed`` where the disk refuses."""
    try:
        return save(folder, checkpoint)
    except OSError as error:
        said = _refusal(folder, checkpoint, error)
        raise DiskFailed(f"{said}; make room, then the same command continues from there") from error


def try_to_save(folder: Path, checkpoint: Checkpoint) -> Path | None:
    """``save`` for a checkpoint that the next one replaces: where the disk refuses, a warning says so; returns None."""
    try:
        return save(folder, checkpoint)
    except OSError as error:
        said = _refusal(folder, checkpoint, error)
        logging.getLogger(__name__).warning("%s; training goes on and saves again at the next checkpoint", said)
        return None


def _without_older(folder: Path, path: Path) -> Path:
    """``path``, known to be valid, after the removal of its predecessors."""
    for other in _numbered(folder):
        if _step(other) < _step(path):
            remove_folder(other)
    return path


def _refusal(folder: Path, checkpoint: Checkpoint, error: OSError) -> str:
    needed = sum(t.numel() * t.element_size() for part in checkpoint.tensors.values() for t in part.values())
    earlier = max(_numbered(folder), key=_step, default=None)
    kept = "no earlier checkpoint is there" if earlier is None else f"{earlier.name} is kept"
    why = error.strerror or error
    return f"{folder}: step {checkpoint.step} could not be saved: {why} ({needed:,} bytes needed); {kept}"


def _write(path: Path, tensors: Tensors) -> None:
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # its writer tells of a full disk in words only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def newest(folder: Path) -> Path | None:
    """For the training itself: the valid checkpoint with the highest step; damaged ones above it are set aside.

    None where there was never one. Raises ``DataError`` where there are only damaged ones, set aside or not, or one of
    another format version, and ``DiskFailed`` where the disk does not let one be judged, so that a training never
    starts anew by accident. Nothing is changed then.
    """
    damaged: dict[Path, str] = {}
    try:
        clear_leftovers(folder)
        aside = sorted(folder.glob("step-*.bad*"))
        for candidate in sorted(_numbered(folder), key=_step, reverse=True):
            wrong = _damage(candidate)
            if wrong is None:
                for path in damaged:
                    _set_aside(path)
                return _without_older(folder, candidate)  # a killed process may not have come to it
            damaged[candidate] = wrong
    except Foreign as error:
        raise DataError(
            f"{folder}: {error}; nothing was changed: go on with the modis_dist that wrote it, or use another output "
            "folder to start anew"
        ) from None
    except OSError as error:
        where = shown(str(error.filename or folder))
        raise DiskFailed(f"{where}: {_refused(error)}; nothing was changed, the same command tries again") from error
    problems = [f"{path.name}: {wrong}" for path, wrong in damaged.items()]
    problems += [f"{path.name}: was found damaged" for path in aside]
    if problems:
        raise DataError(
            f"{folder}: no valid checkpoint ({'; '.join(problems)}); restore it, or use another output folder to start "
            "anew"
        )
    return None


def latest(folder: Path) -> Path | None:
    """For readers: the checkpoint with the highest step. Changes nothing, so a training may be running there.

    None where there is none. Raises ``DataError`` where it cannot be used; an older model is never taken in its place
    unasked.
    """
    while (found := max(_numbered(folder), key=_step, default=None)) is not None:
        wrong = problem(found)
        if wrong is None:
            return found
        if max(_numbered(folder), key=_step, default=None) == found:  # not just replaced by a running training
            others = sorted(other.name for other in _numbered(folder) if problem(other) is None)
            advice = f"take another checkpoint by its own path ({', '.join(others)})" if others else "restore it"
            raise DataError(f"{found}: {wrong}; {advice} or train again into another output folder")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises ``DataError`` where it is damaged or of another format."""
    wrong = problem(path)
    if wrong is not None:
        raise DataError(f"{path}: {wrong}")
    state = json.loads((path / "state.json").read_text())
    named = (path / name for name in json.loads((path / "manifest.json").read_text())["sha256"])
    try:
        tensors = {file.stem: load_file(file) for file in named if file.suffix == ".safetensors"}
    except SafetensorError as error:
        raise DataError(f"{path}: not readable: {shown(str(error))}") from None
    return Checkpoint(_step(path), tensors, state)


def problem(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    try:
        return _damage(path)
    except Foreign as error:
        return str(error)
    except OSError as error:
        return _refused(error)


class Foreign(Exception):
    """A checkpoint of another format version, which may be sound."""


def _damage(path: Path) -> str | None:
    """What is damaged in a checkpoint folder, or None. Raises ``Foreign`` or ``OSError`` where that is not known."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["version"] != VERSION:
            raise Foreign(f"format version {shown(manifest['version'])}; this program reads version {VERSION}")
        if manifest["step"] != _step(path):
            return f"the manifest is of step {shown(manifest['step'])}"
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


def _is_sound(path: Path) -> bool:
    """Whether a checkpoint can be used. Raises ``OSError`` where that is not known."""
    try:
        return _damage(path) is None
    except Foreign:
        return False


def _refused(error: OSError) -> str:
    return f"cannot be read at the moment ({error.strerror or error})"


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints by their names. Raises ``OSError`` where that is not known, which ``glob`` would not tell."""
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
    """Rename a damaged checkpoint so that it is kept but never chosen."""
    number = 0
    while (target := path.with_name(f"{path.name}.bad{number or ''}")).exists():
        number += 1
    path.rename(target)
