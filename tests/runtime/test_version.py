"""The hash of the package's source."""

from pathlib import Path

import pytest

import modis_dist
from modis_dist.runtime import version


def test_the_hash_covers_every_module_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(modis_dist.__file__).parent == version.PACKAGE
    for name in ("a.py", "train/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(version, "PACKAGE", tmp_path)
    before = version.code.__wrapped__()
    (tmp_path / "train/b.py").write_text("x = 2")
    assert version.code.__wrapped__() != before
