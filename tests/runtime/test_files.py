"""Writing files: atomic, private, never through a planted link."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modis_dist.runtime import files


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    previous = os.umask(0)
    yield
    os.umask(previous)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_replaced_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    file.chmod(0o666)
    files.write_json(file, {"b": [1, None, "é"]})
    assert json.loads(file.read_text()) == {"b": [1, None, "é"]} and file.read_text().endswith("\n")
    assert file.stat().st_mode & 0o777 == 0o600 and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, failing)
    with pytest.raises(OSError) as refused:
        files.write_text(file, "new")
    assert refused.value.errno == errno.ENOSPC
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_link_planted_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".a.txt.{os.getpid()}.tmp").symlink_to(victim)
    files.write_text(tmp_path / "a.txt", "new")
    assert victim.read_text() == "mine" and (tmp_path / "a.txt").read_text() == "new"


def test_a_file_planted_at_the_temporary_name_is_not_written_to(tmp_path: Path) -> None:
    planted = tmp_path / f".a.txt.{os.getpid()}.tmp"
    planted.write_text("open to all")
    planted.chmod(0o666)
    with planted.open() as reader:
        files.write_text(tmp_path / "a.txt", "new")
        assert reader.read() == "open to all"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600 and names(tmp_path) == ["a.txt"]


def test_a_new_folder_appears_atomically_and_private(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with files.new_folder(target) as temporary:
        files.write_text(temporary / "a", "1")
        assert not target.exists()
    assert names(tmp_path) == ["a", "step-1"] and target.stat().st_mode & 0o777 == 0o700


def test_an_unfinished_folder_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), files.new_folder(tmp_path / "step-1") as temporary:
        files.write_text(temporary / "a", "1")
        raise RuntimeError("half way")
    assert names(tmp_path) == []


def test_a_folder_that_exists_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(OSError) as refused, files.new_folder(target) as temporary:
        files.write_text(temporary / "a", "1")
    assert refused.value.errno == errno.ENOTEMPTY
    assert names(tmp_path) == ["mine", "step-1"]


def test_leftovers_of_a_killed_process_with_the_same_pid_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / f".step-1.{os.getpid()}.tmp"
    leftover.mkdir()
    (leftover / "torn").write_text("x")
    with files.new_folder(tmp_path / "step-1") as temporary:
        files.write_text(temporary / "a", "1")
    assert names(tmp_path) == ["a", "step-1"]


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert files.sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
