"""Kill and resume trainings many times and check that results are bit-identical: `python tools/soak.py --kills 1000`.

With `--ranks 2` one of several ranks is killed, at steps and while rank 0 writes. With `--sweep local ray` studies of
twelve trials are killed at random moments: their driver, and workers of Ray.

Exits with 0 if all results equal those of uninterrupted trainings, with 3 if not.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch: trainings are forked

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

import pandas  # noqa: F401, this and torch._dynamo are imported late, which takes longer than a training
import torch
import torch._dynamo
from rich.console import Console
from rich.progress import Progress

from tests.study import kills as sweep_kills
from tests.study.toy_study import write_store
from tests.train import kills, rank_kills

MAX_SHOWN = 20  # differences; --json prints all
MEMORY = Path("/dev/shm")  # writes of a killed process survive there as on a disk


def main() -> int:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="number of kills, at least (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kill times (default 0)")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks of a training (default 1)")
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
        store = write_in_child(folder / "store")
        tally = _soak(options)(
            options.kills,
            seed=options.seed,
            folder=folder,
            store=store,
            report=lambda tally: bars.update(bar, completed=tally.kills),
        )
    seconds = {"seconds": time.monotonic() - start, "cpu_seconds": sum(os.times()[:4]) - cpu}
    report = asdict(tally) | {name: round(value, 1) for name, value in seconds.items()}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in report.items() if name != "differences"))
        print("\n".join(tally.differences[:MAX_SHOWN]) or "no difference")
    return 3 if tally.differences else 0


def _soak(options: argparse.Namespace) -> Callable[..., kills.Tally]:
    """Return the function that kills what the options name."""
    if options.sweep:
        return partial(sweep_kills.soak, executors=options.sweep)
    return partial(rank_kills.soak, size=options.ranks) if options.ranks > 1 else kills.soak


def write_in_child(store: Path) -> Path:
    """Write the toy store in a forked process: writing starts threads, which later forks would not have."""
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
