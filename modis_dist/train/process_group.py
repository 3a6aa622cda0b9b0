"""Ranks that meet, and what happens when one of them is lost.

A collective that is not answered within a minute ends the training on every rank that notices, with the name of the
rank that did not. Ranks on one machine meet in a file and talk over the loopback interface: nothing listens elsewhere.
Ranks on several meet at an address of the first one's, where a ``TCPStore`` listens, on every interface of its machine
and without a password, and talk over the interface that leads there; who gives an address asks for that.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from modis_dist.distributed import World
from modis_dist.runtime.errors import ModisError, RankLost
from modis_dist.runtime.text import shown

TIMEOUT_S = 60.0  # of a collective in the middle of training
PATIENCE_S = 1800.0  # until all ranks have their data, or rank 0 has written a checkpoint
GONE = "is gone"
STOPPED = "it is stopped (SIGSTOP)"
BETWEEN_LOOKS_S = 0.05
SETTLE_S = 5.0  # in which every rank that still runs notices that another is lost
FILE = "file://"

# By itself PyTorch has a thread watch NCCL's collectives and end the whole process where one is late: nothing could be
# told, nor named. Waiting in the thread that asked, as gloo does, raises there instead, and no such thread is made.
NCCL = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


@dataclass(frozen=True)
class RankSpec:
    """Which rank a process is, and the ``file://`` or ``tcp://`` address where the ranks meet; used once."""

    rank: int = 0
    size: int = 1
    meeting: str = ""


ALONE = RankSpec()

# The groups this process has joined. To free one waits, holding Python's lock, for its thread, which may be waiting for
# that lock to free the tensors of a collective that has just failed: both would wait for ever.
_never_freed: list[Any] = []


@contextmanager
def join_process_group(seat: RankSpec, *, device: torch.device, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Join the other ranks, where there are any; yields the world. Raises what ``init_process_group`` raises."""
    if seat.size == 1:
        yield World()
        return
    with init_process_group(seat, device=device, timeout_s=timeout_s) as world:
        yield world


@contextmanager
def init_process_group(seat: RankSpec, *, device: torch.device, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Meet the other ranks, of which there may be none, and talk through a process group; yields the world.

    Raises ``RankLost`` naming the ranks that are lost, where that is why this one cannot go on.
    """
    rank, size, meeting = seat.rank, seat.size, seat.meeting
    interface = _interface("127.0.0.1" if meeting.startswith(FILE) else address_towards(meeting))
    # Whatever the cluster sets.
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, **NCCL}
    store = _store(seat)
    roll = _Presence(store, rank, size, timeout_s)
    roll.wait_for_all()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=PrefixStore("ranks", store), rank=rank, world_size=size, timeout=limit)
    try:
        host = dist.new_group(backend="gloo", timeout=limit)
        _never_freed.extend((dist.group.WORLD, host))
        yield World(rank, size, host, roll)
        roll.leave("")
    except ModisError:
        roll.leave("")
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        roll.leave(why)
        if not _of_the_connection(why):
            raise
        lost = roll.lost(waited_s=timeout_s)
        if lost:
            raise RankLost(lost) from error
        raise
    finally:
        with suppress(Exception):  # the connections of a lost rank cannot be closed in order
            dist.destroy_process_group()


def _store(seat: RankSpec) -> Store:
    """What the ranks that meet share. A path is taken as it is: PyTorch would read an address that ends at # or ?."""
    if seat.meeting.startswith(FILE):
        return FileStore(seat.meeting.removeprefix(FILE), seat.size)
    store: Store = next(rendezvous(seat.meeting, seat.rank, seat.size, timeout=timedelta(seconds=PATIENCE_S)))[0]
    return store


def _of_the_connection(why: str) -> bool:
    """Whether an error says only that another rank did not answer."""
    return any(sign in why for sign in ("gloo", "Gloo", "NCCL", "DistNetworkError", "DistBackendError", "onnection"))


class _Presence:
    """Who is there, on the store that the ranks share: a key per rank when it comes and one when it leaves."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._timeout_s = timeout_s
        self._others = [other for other in range(size) if other != rank]
        store.set(f"here/{rank}", f"{os.getpid()} {socket.gethostname()}")

    def wait_for_all(self) -> None:
        """Until every rank is there."""
        self._store.wait([f"here/{other}" for other in self._others], timedelta(seconds=PATIENCE_S))

    def says(self, word: str) -> None:
        """As in ``world.Presence``."""
        self._store.set(f"{word}/{self._rank}", "said")

    def wait_for(self, rank: int, word: str) -> None:
        """As in ``world.Presence``; raises ``RankLost`` where the rank is gone, or has been stopped for the timeout."""
        end, moved = time.monotonic() + PATIENCE_S, time.monotonic()
        while True:
            # Asked before the word is looked for: who has said it may leave at once.
            told, left = self._described(rank, self._timeout_s), self._store.check([f"left/{rank}"])
            now = time.monotonic()
            if self._store.check([f"{word}/{rank}"]):
                return
            moved = moved if STOPPED in told else now
            if GONE in told or left or now - moved > self._timeout_s or now > end:
                raise RankLost(told)
            time.sleep(BETWEEN_LOOKS_S)

    def leave(self, why: str) -> None:
        """Say that this rank does not go on, and why."""
        with suppress(Exception):  # the store itself may be gone with its rank
            self._store.set(f"left/{self._rank}", why)

    def lost(self, *, waited_s: float) -> str:
        """Which ranks neither train nor have left, in words; where all have left, which of them failed by itself."""
        end = time.monotonic() + SETTLE_S
        missing = self._missing()
        while missing and time.monotonic() < end and not any(self._is_gone(other) for other in missing):
            time.sleep(0.1)
            missing = self._missing()
        if missing:
            return "; ".join(self._described(other, waited_s) for other in missing)
        said = {other: self._store.get(f"left/{other}").decode() for other in self._others}
        own = {other: why for other, why in said.items() if why and not _of_the_connection(why)}
        return "; ".join(f"{self._name(other)} ended: {shown(why)}" for other, why in own.items())

    def _missing(self) -> list[int]:
        try:
            return [other for other in self._others if not self._store.check([f"left/{other}"])]
        except Exception:
            return [0]  # a store over TCP is kept by rank 0

    def _is_gone(self, rank: int) -> bool:
        return GONE in self._described(rank, 0.0)

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {len(self._others) + 1}"

    def _described(self, rank: int, waited_s: float) -> str:
        name = self._name(rank)
        try:
            pid, host = self._store.get(f"here/{rank}").decode().split(" ", 1)
        except Exception:
            return f"{name} {GONE}"
        name = f"{name} (process {pid} on {shown(host)})"
        if host != socket.gethostname():
            return f"{name} has not answered for {waited_s:.0f} s"
        try:
            status = psutil.Process(int(pid)).status()
        except psutil.NoSuchProcess:
            return f"{name} {GONE}; was it killed, by the user or for want of memory?"
        if status == psutil.STATUS_ZOMBIE:
            return f"{name} {GONE}; was it killed, by the user or for want of memory?"
        why = STOPPED if status == psutil.STATUS_STOPPED else f"it is {status}"
        return f"{name} has not answered for {waited_s:.0f} s: {why}"


def _interface(address: str) -> str:
    """Name of the interface of this machine that has an address."""
    held = psutil.net_if_addrs()
    return next(name for name, has in held.items() if any(a.address.partition("%")[0] == address for a in has))


def address_towards(meeting: str) -> str:
    """The address of this machine from which it reaches a ``tcp://`` address."""
    place = urlsplit(meeting)
    assert place.hostname is not None
    family, kind, _, _, destination = socket.getaddrinfo(place.hostname, place.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asking:  # nothing is sent
        asking.connect(destination)
        return str(asking.getsockname()[0])


def rendezvous_file(folder: Path) -> str:
    """An address in a folder that all ranks see and nobody else may enter."""
    return f"{FILE}{folder / 'ranks'}"


def rendezvous_port(address: str) -> str:
    """An address on this machine, the first rank's, that ranks on others reach; its port is free now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as trying:
        trying.bind((address, 0))
        port = trying.getsockname()[1]
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
