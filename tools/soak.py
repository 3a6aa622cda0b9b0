"""Kills trainings a thousand times and compares what is left, bit for bit: `python tools/soak.py --kills 1000`.

With `--ranks 2` it kills one of several ranks that train together, at steps and while the first one writes. With
`--sweep local ray` it kills studies of twelve trials at random moments: their driver, and workers of Ray.

Exit code 0 where nothing differs from trainings that nobody disturbed, 3 where something does.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch: lives are forked

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are not installed

import pandas  # noqa: F401, this and torch._dynamo are imported late, which takes longer than a life
import torch
import torch._dynamo
from rich.console import Console
from rich.progress import Progress

from tests.study import kills as sweep_kills
from tests.study.toy_study import write_store
from tests.train import kills, rank_kills

MOST_SHOWN = 20  # differences; --json has all
MEMORY = Path("/dev/shm")  # a killed process loses nothing there that it would keep on a disk


def main() -> int:
    """Soak and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="at least so many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="chooses where (default 0)")
    parser.add_argument("--ranks", type=int, default=1, help="kill trainings on so many ranks (default 1)")
    parser.add_argument("--sweep", nargs="+", choices=["local", "ray"], help="kill studies with these executors")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, start, cpu = Console(stderr=True), time.monotonic(), sum(os.times()[:4])
    with (
        tempfile.TemporaryDirectory(prefix="soak-", dir=MEMORY if MEMORY.is_dir() else None) as name,
        Progress(console=console, disable=not console.is_terminal) as bars,
    ):
        bar = bars.add_task("kills", total=options.kills)
        folder = Path(name)
        store = made_elsewhere(folder / "store")
        tally = _victims(options)(
            options.kills,
            seed=options.seed,
            folder=folder,
            store=store,
            told=lambda tally: bars.update(bar, completed=tally.kills),
        )
    seconds = {"seconds": time.monotonic() - start, "cpu_seconds": sum(os.times()[:4]) - cpu}
    report = asdict(tally) | {name: round(value, 1) for name, value in seconds.items()}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in report.items() if name != "differences"))
        print("\n".join(tally.differences[:MOST_SHOWN]) or "no difference")
    return 3 if tally.differences else 0


def _victims(options: argparse.Namespace) -> Callable[..., kills.Tally]:
    """What kills what was asked for."""
    if options.sweep:
        return partial(sweep_kills.soak, executors=options.sweep)
    return partial(rank_kills.soak, size=options.ranks) if options.ranks > 1 else kills.soak


def made_elsewhere(store: Path) -> Path:
    """A store of the toy, written by a forked process: writing starts threads, which no later fork would have."""
    child = os.fork()
    if child == 0:
        write_store(store, samples=60)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the toy store could not be written")
    return store


if __name__ == "__main__":
    sys.exit(main())
