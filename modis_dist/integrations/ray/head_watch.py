"""Noticing the end of Ray's head, or of its node here, which Ray tells nobody for a minute, or never."""

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
BETWEEN_LOOKS_S = 1.0
PATIENCE_S = 5.0  # a busy machine may not answer at once


def while_ray_lives(work: Callable[[], T]) -> T:
    """``work()``, in a thread beside; what it returns or raises.

    Raises ``MachineFailed`` where Ray's head, or its node on this machine, has not listened for some seconds: ``work``
    may wait for ever then.
    """
    listeners = _listeners()
    result: Future[T] = Future()
    # Not a pool's: Python waits for those at its end.
    threading.Thread(target=_settle, args=(result, work), name="beside", daemon=True).start()
    last = time.monotonic()
    while not wait([result], BETWEEN_LOOKS_S).done:
        if all(map(_listens, listeners)):
            last = time.monotonic()
        elif time.monotonic() - last > PATIENCE_S:
            atexit.register(_leave)
            raise MachineFailed(
                "Ray's own processes are gone (killed, by the user or for want of memory?); what was saved is kept, "
                "the same command continues"
            )
    return result.result()


def _leave() -> None:
    """End the process at its end, before what Ray has registered for then: that would wait for the dead head."""
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
    """Where Ray's head and its node on this machine listen."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [(host.strip("[]"), int(port)), (here["NodeManagerAddress"], here["NodeManagerPort"])]


def _listens(address: tuple[str, int]) -> bool:
    with suppress(OSError), socket.create_connection(address, BETWEEN_LOOKS_S):
        return True
    return False
