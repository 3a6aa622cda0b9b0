"""Each side of a comparison in a process of its own: how a process keeps its memory and threads is part of a side.

Only one of them works at a time; the others wait for a message and take no time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from modis_dist.runtime.processes import end_with_parent
from tools.bench.measure import Work

Make = Callable[[Any], Work]  # of what is asked for; must be found by its name in a new process


@contextmanager
def apart(sides: Mapping[str, Make], asked: Any, *, device: torch.device) -> Iterator[dict[str, Work]]:
    """Works that are done elsewhere; their processes end with the block. What a side raises ends it with EOFError."""
    spawn = get_context("spawn")
    with ExitStack() as held:
        works: dict[str, Work] = {}
        for name, make in sides.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, make, asked, device), daemon=True)
            process.start()
            theirs.close()
            held.callback(process.join)
            held.callback(ours.close)
            ours.recv()  # it is ready
            works[name] = partial(_done, ours)
        yield works


def _done(there: Connection, times: int) -> None:
    there.send(times)
    there.recv()


def _serve(there: Connection, make: Make, asked: Any, device: torch.device) -> None:
    end_with_parent()
    work = make(asked)
    there.send(None)
    while True:
        try:
            times = there.recv()
        except EOFError:
            return
        work(times)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        there.send(None)
