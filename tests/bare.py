"""Run a module without drawing figures: `python tests/bare.py -m modis_dist ...`.

Figures would take most of the time of a test; `tests/report` tests them.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if Path(sys.path[0]) == Path(__file__).parent:  # folders of tests have the names of packages
    sys.path.pop(0)

from modis_dist.cli.main import main
from modis_dist.execution import run_pack
from modis_dist.report import drawing

if TYPE_CHECKING:
    import pytest


def skip_figures(patch: "pytest.MonkeyPatch | None" = None) -> None:
    """Draw no figures in this process, until ``patch`` is undone."""
    replace = setattr if patch is None else patch.setattr
    replace(run_pack, "draw", lambda *_: None)
    replace(drawing, "save", lambda *_: None)


if __name__ == "__main__":
    skip_figures()
    main(sys.argv[3:])  # after `-m modis_dist`
