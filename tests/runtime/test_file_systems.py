"""The kind of file system of a path."""

from pathlib import Path

from modis_dist.runtime.file_systems import file_system


def test_the_innermost_mount_decides_also_for_a_path_that_does_not_exist(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    spaced = tmp_path / "with space"
    spaced.mkdir()
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {str(spaced).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n")
    assert file_system(spaced / "deep", mounts=mounts) == "nfs4"
    assert file_system(tmp_path, mounts=mounts) == "ext4"


def test_without_a_list_of_mounts_the_kind_is_unknown(tmp_path: Path) -> None:
    assert file_system(tmp_path, mounts=tmp_path / "none") == ""
