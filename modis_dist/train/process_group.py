"""The process group of one training, and detection of lost ranks.

A collective times out after a minute: every waiting rank then ends with an error that names the lost rank. Ranks on
one machine rendezvous in a file and use the loopback interface: nothing listens elsewhere. Ranks on several machines
rendezvous at an address of rank 0, where a ``TCPStore`` listens on every interface without a password, and use the
network interface that reaches it; that port is opened only if the caller passes an address.
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
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from modis_dist.distributed import World
from modis_dist.runtime.errors import ModisError, RankLost
from modis_dist.runtime.text import shown

TIMEOUT_S = 60.0  # of a collective during training
WAIT_S = 1800.0  # for all ranks to load their data, or for rank 0 to write a checkpoint
GONE = "is gone"
STOPPED = "it is stopped (SIGSTOP)"
POLL_S = 0.05
SETTLE_S = 5.0  # for every rank that still runs to notice that another is lost
FILE = "file://"

# By default PyTorch's NCCL watchdog thread ends the process when a collective is late, without a useful message.
# Blocking in the calling thread, as gloo does, raises an error there and starts no watchdog.
NCCL = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


@dataclass(frozen=True)
class RankSpec:
    """Rank of a process, world size, and the ``file://`` or ``tcp://`` address of the rendezvous; for a single use."""

    rank: int = 0
    size: int = 1
    address: str = ""


ALONE = RankSpec()

# Groups that this process joined. Freeing a group joins its thread while holding the GIL, which that thread may need to
# free the tensors of a failed collective: a deadlock.
_never_freed: list[Any] = []


@contextmanager
def join_process_group(spec: RankSpec, *, device: torch.device) -> Iterator[World]:
    """Join the process group if there are several ranks; yield the world. Raises as ``init_process_group``."""
    if spec.size == 1:
        yield World()
        return
    with init_process_group(spec, device=device) as world:
        yield world


@contextmanager
def init_process_group(spec: RankSpec, *, device: torch.device, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Form a process group with the other ranks, or of a single rank; yield the world.

    Raises ``RankLost`` naming the lost ranks if this rank fails because of them.
    """
    rank, size = spec.rank, spec.size
    interface = _interface("127.0.0.1" if spec.address.startswith(FILE) else address_towards(spec.address))
    # Overrides the cluster's settings.
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, **NCCL}
    store = _store(spec)
    presence = _Presence(store, rank, size, timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=PrefixStore("ranks", store), rank=rank, world_size=size, timeout=limit)
    try:
        host_group = dist.new_group(backend="gloo", timeout=limit)
        _never_freed.extend((dist.group.WORLD, host_group))
        yield World(rank, size, host_group, presence)
        presence.leave("")
    except ModisError:
        presence.leave("")
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        presence.leave(reason)
        if not _is_connection_error(reason):
            raise
        lost = presence.lost(waited_s=timeout_s)
        if lost:
            raise RankLost(lost) from error
        raise
    finally:
        with suppress(Exception):  # fails with the connections of a lost rank
            dist.destroy_process_group()


def _store(spec: RankSpec) -> Store:
    """Return the store of the rendezvous. Files are opened directly: PyTorch would cut their path at # or ?."""
    if spec.address.startswith(FILE):
        return FileStore(spec.address.removeprefix(FILE), spec.size)
    store: Store = next(rendezvous(spec.address, spec.rank, spec.size, timeout=timedelta(seconds=WAIT_S)))[0]
    return store


def _is_connection_error(reason: str) -> bool:
    """Return True if an error only says that another rank did not respond."""
    return any(sign in reason for sign in ("gloo", "Gloo", "NCCL", "DistNetworkError", "DistBackendError", "onnection"))


class _Presence:
    """Presence of ranks in the store of the rendezvous: a key per rank that joined, and one per rank that left.

    The constructor announces this rank and blocks until every rank has joined.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._timeout_s = timeout_s
        self._others = [other for other in range(size) if other != rank]
        store.set(f"here/{rank}", f"{os.getpid()} {socket.gethostname()}")
        store.wait([f"here/{other}" for other in self._others], timedelta(seconds=WAIT_S))

    def announce(self, word: str) -> None:
        """See ``distributed.Presence``."""
        self._store.set(f"{word}/{self._rank}", "done")

    def wait_for(self, rank: int, word: str) -> None:
        """See ``distributed.Presence``; raises ``RankLost`` if the rank has ended or is stopped beyond the timeout."""
        deadline, last_running = time.monotonic() + WAIT_S, time.monotonic()
        while True:
            # Checked before the announcement, right after which the rank may leave.
            status, left = self._describe(rank, self._timeout_s), self._store.check([f"left/{rank}"])
            now = time.monotonic()
            if self._store.check([f"{word}/{rank}"]):
                return
            last_running = last_running if STOPPED in status else now
            if GONE in status or left or now - last_running > self._timeout_s or now > deadline:
                raise RankLost(status)
            time.sleep(POLL_S)

    def leave(self, reason: str) -> None:
        """Record that this rank ends, and the reason."""
        with suppress(Exception):  # the store itself may be gone with its rank
            self._store.set(f"left/{self._rank}", reason)

    def lost(self, *, waited_s: float) -> str:
        """Describe the ranks that did not report leaving; if all did, those that failed with an error of their own."""
        deadline = time.monotonic() + SETTLE_S
        missing = self._missing()
        while missing and time.monotonic() < deadline and not any(GONE in self._describe(r, 0.0) for r in missing):
            time.sleep(0.1)
            missing = self._missing()
        if missing:
            return "; ".join(self._describe(other, waited_s) for other in missing)
        reasons = {other: self._store.get(f"left/{other}").decode() for other in self._others}
        failed = {other: reason for other, reason in reasons.items() if reason and not _is_connection_error(reason)}
        return "; ".join(f"{self._name(other)} ended: {shown(reason)}" for other, reason in failed.items())

    def _missing(self) -> list[int]:
        try:
            return [other for other in self._others if not self._store.check([f"left/{other}"])]
        except Exception:
            return [0]  # rank 0 serves a TCP store

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {len(self._others) + 1}"

    def _describe(self, rank: int, waited_s: float) -> str:
        name = self._name(rank)
        try:
            pid, host = self._store.get(f"here/{rank}").decode().split(" ", 1)
        except Exception:
            return f"{name} {GONE}"
        name = f"{name} (process {pid} on {shown(host)})"
        if host != socket.gethostname():
            return f"{name} has not responded for {waited_s:.0f} s"
        try:
            status = psutil.Process(int(pid)).status()
        except psutil.NoSuchProcess:
            status = psutil.STATUS_ZOMBIE
        if status == psutil.STATUS_ZOMBIE:
            return f"{name} {GONE}; it may have been killed (by a user, or out of memory)"
        reason = STOPPED if status == psutil.STATUS_STOPPED else f"it is {status}"
        return f"{name} has not responded for {waited_s:.0f} s: {reason}"


def _interface(address: str) -> str:
    """Return the name of the network interface with an address of this machine."""
    interfaces = psutil.net_if_addrs().items()
    return next(
        name for name, addresses in interfaces if any(a.address.partition("%")[0] == address for a in addresses)
    )


def address_towards(url: str) -> str:
    """Return the address of this machine from which it reaches a ``tcp://`` address."""
    remote = urlsplit(url)
    assert remote.hostname is not None
    family, kind, _, _, destination = socket.getaddrinfo(remote.hostname, remote.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:  # sends nothing
        sock.connect(destination)
        return str(sock.getsockname()[0])


def rendezvous_file(folder: Path) -> str:
    """Return a rendezvous address in a private folder that all ranks see."""
    return f"{FILE}{folder / 'ranks'}"


def rendezvous_port(address: str) -> str:
    """Return a rendezvous address with a free port on this machine, rank 0's, for ranks on other machines."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        port = listener.getsockname()[1]
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
