"""`python tests/bare.py -m modis_dist ...` is `python -m modis_dist ...` without figures.

They would take most of the time of a test; `tests/report` tests them.
"""

import sys
from pathlib import Path

if Path(sys.path[0]) == Path(__file__).parent:  # folders in there have names of packages
    sys.path.pop(0)

import pytest

from modis_dist.cli.main import main
from modis_dist.execution import run_pack
from modis_dist.report import drawing


def skip_figures(patch: pytest.MonkeyPatch | None = None) -> None:
    """Draw no figures in this process, until ``patch`` is undone."""
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(run_pack, "draw", lambda *_: None)
    patch.setattr(drawing, "save", lambda *_: None)


if __name__ == "__main__":
    skip_figures()
    main(sys.argv[3:])  # after `-m modis_dist`
