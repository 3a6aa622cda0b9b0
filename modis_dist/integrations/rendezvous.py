"""Rendezvous of processes on several nodes: a shared folder, and addresses that other nodes can reach."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from modis_dist.train.process_group import address_towards

LOOPBACK = frozenset({"127.0.0.1", "127.0.1.1"})  # addresses of a host name that only this machine can reach


def names_in(folder: Path, *, me: str) -> set[str]:
    """Return the current file names of a folder.

    Clients of network file systems may cache a folder for up to a minute; writing to it refreshes the cache.
    """
    marker = folder / f".look-{me}"
    marker.touch()
    marker.unlink(missing_ok=True)
    return {entry.name for entry in folder.iterdir()}


def own_address() -> str:
    """Return an address of this machine that the other nodes of the job can reach.

    The address of its host name or, if that is loopback, its address towards the machine that runs srun.
    """
    with suppress(OSError):
        address = socket.gethostbyname(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        if address not in LOOPBACK:
            return address
    return address_towards(f"tcp://{os.environ['SLURM_LAUNCH_NODE_IPADDR']}:1")
