"""How processes on several nodes find each other: by a folder that all see, and by addresses that lead to a node."""

import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from modis_dist.train.process_group import address_towards

LOOPBACK = frozenset({"127.0.0.1", "127.0.1.1"})  # what a name leads to that leads no further


def names_in(folder: Path, *, me: str) -> set[str]:
    """The names of files in a folder, as they are now.

    A machine may show a network folder as it was up to a minute ago, until it writes there itself.
    """
    look = folder / f".look-{me}"
    look.touch()
    look.unlink(missing_ok=True)
    return {entry.name for entry in folder.iterdir()}


def own_address() -> str:
    """An address of this machine under which the other nodes of the job reach it.

    That of its name, unless the name leads to the machine itself only; then the one towards where srun runs.
    """
    with suppress(OSError):
        found = socket.gethostbyname(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        if found not in LOOPBACK:
            return found
    return address_towards(f"tcp://{os.environ['SLURM_LAUNCH_NODE_IPADDR']}:1")


def is_loopback(address: str) -> bool:
    """Whether an address leads no further than this machine."""
    return ip_address(address.partition("%")[0]).is_loopback
