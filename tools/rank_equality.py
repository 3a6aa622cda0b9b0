"""Largest difference of any parameter or statistic between the steps of several ranks and those of one rank.

    python tools/rank_equality.py            # one, two and three ranks, float64 and float32
    python tools/rank_equality.py --json

Real processes over gloo on this machine. Each case is four steps of a small system with all losses and the penalty.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modis_dist.distributed import ALONE, World
from tests.numeric.test_world_size import CASES, run
from tests.ranks import on_ranks

SIZES = (2, 3)
TYPES = {"float64": torch.float64, "float32": torch.float32}


def all_cases(world: World, folder: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Return parameters and statistics after the steps of every case, by type."""
    del folder
    return {name: {case: run(world, CASES[case], dtype)[0] for case in CASES} for name, dtype in TYPES.items()}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of any value."""
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())


def measured() -> list[dict[str, Any]]:
    """Return a row per case, type and number of ranks."""
    torch.set_num_threads(1)
    expected = all_cases(ALONE, Path())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            ranks = on_ranks(size, all_cases, Path(folder) / str(size))
            for name in TYPES:
                for case in CASES:
                    states = [rank[name][case] for rank in ranks]
                    apart = max(furthest(state, states[0]) for state in states)
                    from_one = furthest(states[0], expected[name][case])
                    rows.append({"case": case, "type": name, "ranks": size, "from_one": from_one, "between": apart})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    rows = measured()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("case", *(f"{name}, {size} ranks" for name in TYPES for size in SIZES), "between ranks")
    for case in CASES:
        of_case = [row for row in rows if row["case"] == case]
        largest = {(row["type"], row["ranks"]): f"{row['from_one']:.1e}" for row in of_case}
        between = max(row["between"] for row in of_case)
        table.add_row(case, *(largest[name, size] for name in TYPES for size in SIZES), f"{between:.0e}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
