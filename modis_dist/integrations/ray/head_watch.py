"""Detection of a dead Ray head or local Ray node, which Ray itself reports after a minute or never."""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from modis_dist.runtime.errors import MachineFailed

T = TypeVar("T")
POLL_S = 1.0
PATIENCE_S = 5.0  # a busy machine may answer late


def while_ray_lives(work: Callable[[], T]) -> T:
    """Call ``work`` in another thread and return its result.

    Raises its errors, and ``MachineFailed`` if Ray's head or its node on this machine stops listening for some seconds:
    ``work`` may then wait forever.
    """
    listeners = _listeners()
    result: Future[T] = Future()
    # Not a pool thread: Python waits for those at exit.
    threading.Thread(target=_settle, args=(result, work), name="while ray lives", daemon=True).start()
    last = time.monotonic()
    while not wait([result], POLL_S).done:
        if all(map(_listens, listeners)):
            last = time.monotonic()
        elif time.monotonic() - last > PATIENCE_S:
            atexit.register(_exit_now)
            raise MachineFailed(
                "Ray has died (killed by the user, or out of memory?); checkpoints are kept: rerun the same command"
            )
    return result.result()


def _exit_now() -> None:
    """Exit before Ray's own exit handlers run: they would wait for the dead head."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(MachineFailed.exit_code)


def _settle(result: "Future[T]", work: Callable[[], T]) -> None:
    try:
        result.set_result(work())
    except BaseException as error:
        result.set_exception(error)


def _listeners() -> list[tuple[str, int]]:
    """Return the addresses at which Ray's head and its node on this machine listen."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [(host.strip("[]"), int(port)), (node["NodeManagerAddress"], node["NodeManagerPort"])]


def _listens(address: tuple[str, int]) -> bool:
    with suppress(OSError), socket.create_connection(address, POLL_S):
        return True
    return False
