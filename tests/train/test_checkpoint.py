"""Checkpoints are complete or absent, the newest valid one is used, and damage is never read silently."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.train import checkpoint
from modis_dist.train.checkpoint import Checkpoint
from tests.train import toy


def made(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(2, 3, generator=generator), "step": torch.tensor(float(step))}
    return Checkpoint(step, {"model": tensors, "optim": {"m": torch.zeros(2, 3)}}, {"epoch": step, "note": "ä"})


def test_a_checkpoint_reads_back_bit_identical(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, made(7))
    loaded = checkpoint.load(checkpoint.newest(tmp_path))
    assert loaded.step == 7 and loaded.state == {"epoch": 7, "note": "ä"}
    for part, tensors in made(7).tensors.items():
        assert all(torch.equal(loaded.tensors[part][name], tensor) for name, tensor in tensors.items())


def test_a_predecessor_is_removed_only_after_its_successor_was_read_back(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, made(1))
    second = checkpoint.save(tmp_path, made(2))
    assert not first.exists() and checkpoint.newest(tmp_path) == second


def test_the_newest_checkpoint_has_the_highest_step_regardless_of_file_times(tmp_path: Path) -> None:
    for step in (3, 12):
        checkpoint.save(tmp_path / str(step), made(step))
        shutil.move(tmp_path / str(step) / f"step-{step:08d}", tmp_path)
    os.utime(tmp_path / "step-00000003", (4e9, 4e9))
    assert checkpoint.newest(tmp_path).name == "step-00000012"


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, made(5))
    chance = random.Random(0)
    files = sorted(path.iterdir())
    silent = 0
    for _ in range(300):
        victim = chance.choice(files)
        original = victim.read_bytes()
        changed = bytearray(original)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        victim.write_bytes(changed)
        if checkpoint.problem(path) is None:
            loaded = checkpoint.load(path)  # a flip in the manifest's white space changes nothing that is read
            equal = all(torch.equal(loaded.tensors["model"][k], v) for k, v in made(5).tensors["model"].items())
            silent += not (equal and loaded.state == made(5).state)
        victim.write_bytes(original)
    assert silent == 0


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "manifest", "rename"])
def test_a_damaged_checkpoint_is_renamed_and_its_predecessor_is_used(tmp_path: Path, damage: str) -> None:
    older = checkpoint.save(tmp_path / "a", made(1))
    newer = checkpoint.save(tmp_path / "b", made(2))
    folder = tmp_path / "c"
    folder.mkdir()
    older, newer = Path(shutil.move(older, folder)), Path(shutil.move(newer, folder))
    model = newer / "model.safetensors"
    match damage:
        case "truncate":
            model.write_bytes(model.read_bytes()[:-1])
        case "empty":
            model.write_bytes(b"")
        case "remove":
            model.unlink()
        case "manifest":
            (newer / "manifest.json").write_text("{")
        case "rename":
            newer.rename(folder / "step-00000009")
    assert checkpoint.newest(folder) == older
    assert [p.suffix for p in folder.iterdir() if p != older] == [".bad"]


@pytest.mark.parametrize("aside", ["", ".bad", ".bad1"])
def test_damaged_checkpoints_never_restart_a_training(tmp_path: Path, aside: str) -> None:
    path = checkpoint.save(tmp_path, made(1))
    (path / "state.json").write_text("{}")
    path.rename(f"{path}{aside}")
    for _ in range(3):
        with pytest.raises(DataError, match=re.escape(path.name + aside)):
            checkpoint.newest(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{path.name}{aside}"]


def test_a_training_whose_only_checkpoint_is_damaged_is_refused_at_every_start(tmp_path: Path) -> None:
    member = toy.member("t", toy.run("optim.epochs=1"), tmp_path)
    toy.train([member], tmp_path)
    (last,) = (tmp_path / "last").iterdir()
    (last / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match=r"model\.safetensors"):
            toy.train([member], tmp_path)


def test_a_disk_error_while_a_step_is_saved_again_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path, made(1))

    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "sha256", refuse)
        assert checkpoint.try_to_save(tmp_path, made(1)) is None
    assert list(tmp_path.iterdir()) == [path] and checkpoint.newest(tmp_path) == path


def test_a_valid_checkpoint_is_used_despite_renamed_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.bad").mkdir()
    assert checkpoint.save(tmp_path, made(2)) == checkpoint.newest(tmp_path)


def of_version(path: Path, version: object) -> Path:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
    return path


@pytest.mark.parametrize("version", [2, 99])
def test_a_checkpoint_of_another_version_is_refused_and_not_renamed(tmp_path: Path, version: int) -> None:
    path = of_version(checkpoint.save(tmp_path, made(1)), version)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}: .*\b{version}\b.*\b{checkpoint.VERSION}\b"):
            checkpoint.newest(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.newest(of_version(path, checkpoint.VERSION).parent) == path


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize(("owner", "name"), [(os, "scandir"), (Path, "read_text"), (checkpoint, "sha256")])
def test_a_temporary_disk_error_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, owner: object, name: str
) -> None:
    path = checkpoint.save(tmp_path, made(1))

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as disk:
        disk.setattr(owner, name, refuse)
        for _ in range(2):
            with pytest.raises(RunFailed) as refused:
                checkpoint.newest(tmp_path)
    message = str(refused.value)
    assert os.strerror(number) in message and "\n" not in message
    assert list(tmp_path.iterdir()) == [path] and checkpoint.newest(tmp_path) == path


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path) -> None:
    path = of_version(checkpoint.save(tmp_path, made(1)), 99)
    for read in (checkpoint.load, lambda path: checkpoint.latest(path.parent)):
        with pytest.raises(DataError, match=r"step-00000001: .*\b99\b"):
            read(path)


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, made(1))
    shutil.copy(path / "optim.safetensors", path / "stranger.safetensors")
    assert checkpoint.load(path).tensors.keys() == {"model", "optim"}


def test_after_any_damage_the_newest_intact_checkpoint_is_read(tmp_path: Path) -> None:
    chance = random.Random(1)
    for number in range(60):
        folder = tmp_path / str(number)
        older, newer = (checkpoint.save(folder / str(step), made(step)) for step in (1, 2))
        older, newer = (Path(shutil.move(path, folder)) for path in (older, newer))
        victim = chance.choice(sorted(newer.iterdir()))
        content = bytearray(victim.read_bytes())
        match chance.choice(["cut", "flip", "zeros", "gone"]):
            case "cut":
                victim.write_bytes(content[: chance.randrange(len(content))])
            case "flip":
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                victim.write_bytes(content)
            case "zeros":
                victim.write_bytes(bytes(len(content)))
            case "gone":
                victim.unlink()
        loaded = checkpoint.load(checkpoint.newest(folder))
        assert all(torch.equal(loaded.tensors["model"][k], v) for k, v in made(loaded.step).tensors["model"].items())
        assert loaded.state == made(loaded.step).state
        left = {path.name for path in folder.glob("step-*")}
        assert left == ({newer.name} if loaded.step == 2 else {older.name, f"{newer.name}.bad"})


def test_predecessors_left_by_a_killed_process_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        shutil.move(checkpoint.save(tmp_path / str(step), made(step)), tmp_path)
    (tmp_path / ".step-00000000.7.tmp").mkdir()
    assert checkpoint.newest(tmp_path).name == "step-00000003"
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000003"]
