"""What tests of every slice share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MODIS_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared")
    return folder
