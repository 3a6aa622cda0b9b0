"""Rewrite the golden runs `tests/numeric/golden/*.json`: `python tools/golden.py`.

Run it only if the numbers are meant to change (another formula, another default of the toy system, another stream of
random numbers), and give the reason in the commit and in CHANGELOG.md. A change that must not alter numbers, such as a
faster kernel or another order of operations, must pass with the existing files.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are not installed

from tests.numeric import golden_runs, toy_system


def main() -> None:
    """Write one file for each adversarial loss."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    golden_runs.FOLDER.mkdir(exist_ok=True)
    for kind in toy_system.KINDS:
        golden_runs.path(kind).write_text(golden_runs.text(kind), encoding="utf-8")
        print(golden_runs.path(kind))


if __name__ == "__main__":
    main()
