"""Runs each side of a comparison in a separate process, with its own memory and threads.

Only one process works at a time; the others block on a pipe.
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

Make = Callable[[Any], Work]  # from the arguments; must be importable by name in a new process


@contextmanager
def in_subprocesses(sides: Mapping[str, Make], arguments: Any, *, device: torch.device) -> Iterator[dict[str, Work]]:
    """Yield works that run in other processes, which end with the block. ``EOFError`` if one of them fails."""
    spawn = get_context("spawn")
    with ExitStack() as stack:
        works: dict[str, Work] = {}
        for name, make in sides.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, make, arguments, device), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(ours.close)
            ours.recv()  # ready
            works[name] = partial(_done, ours)
        yield works


def _done(connection: Connection, times: int) -> None:
    connection.send(times)
    connection.recv()


def _serve(connection: Connection, make: Make, arguments: Any, device: torch.device) -> None:
    end_with_parent()
    work = make(arguments)
    connection.send(None)
    while True:
        try:
            times = connection.recv()
        except EOFError:
            return
        work(times)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        connection.send(None)
