"""One all-reduce over processes that were started apart, each on its node, how long it takes, and a lock between them.

They find each other in a folder that all of them see: each leaves a file there when it comes and one when it is done,
so that whoever started them can tell who never came from who came and could not reach the others. Slurm numbers them;
who starts them without Slurm gives them the same variables. Those of Slurm meet over the network, as ranks on several
nodes do, others over the loopback interface.
"""

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from modis_dist.integrations.rendezvous import names_in, own_address
from modis_dist.runtime.errors import RunFailed, UserError
from modis_dist.runtime.files import write_json
from modis_dist.train.process_group import RankSpec, init_process_group, rendezvous_file, rendezvous_port

LIMIT_S = 60
NUMBERS = 1 << 20  # 4 MB of float32
PERIOD = 7  # small whole numbers: their sums over two thousand ranks are exact
BETWEEN_LOOKS_S = 0.1
MEETING, LOCK = "meeting.json", "lock"


@dataclass(frozen=True)
class Done:
    """What one process says at its end."""

    host: str
    gloo_s: float = 0.0
    nccl_s: float | None = None  # None where not every process has a GPU
    error: str = ""
    kept_out: bool | None = None  # whether it did not get a lock that the first process held; None where it was not to


@dataclass(frozen=True)
class Answers:
    """What stands in the folder, by the number of the process."""

    came: dict[int, str]  # the names of their hosts
    done: dict[int, Done]


def take_part(folder: Path) -> None:
    """The part of this process. It ends by itself, whatever it waits for, after the time limit."""
    signal.alarm(LIMIT_S)
    rank, size = _numbered()
    host = socket.gethostname()
    try:
        with (folder / LOCK).open("a") as lock:
            if rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until all are done
            write_json(folder / f"came-{rank}.json", {"host": host, "gpu": torch.cuda.is_available()})
            told = _told_where(folder, rank, size)
            kept_out = _is_held(lock) if rank else None
            gloo_s, nccl_s = _met(told, rank, size)
        done = Done(host, gloo_s, nccl_s, kept_out=kept_out)
    except Exception as error:
        write_json(folder / f"done-{rank}.json", asdict(Done(host, error=f"{type(error).__name__}: {error}")))
        raise
    write_json(folder / f"done-{rank}.json", asdict(done))
    signal.alarm(0)


def answers(folder: Path, size: int) -> Answers:
    """What each of so many processes has said so far."""
    came = {rank: _read(folder / f"came-{rank}.json") for rank in range(size)}
    done = {rank: _read(folder / f"done-{rank}.json") for rank in range(size)}
    return Answers(
        {rank: str(told["host"]) for rank, told in came.items() if told},
        {rank: Done(**told) for rank, told in done.items() if told},
    )


def _numbered() -> tuple[int, int]:
    try:
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    except (KeyError, ValueError):
        raise UserError("job all-reduce: is started by `modis-dist doctor`, as a step of a job; run that") from None


def _told_where(folder: Path, rank: int, size: int) -> Mapping[str, Any]:
    """Where all meet, once all have come."""
    if rank == 0:
        _call(folder, size)
    _wait_for(folder, rank, [MEETING])
    return _read(folder / MEETING)


def _is_held(lock: TextIO) -> bool:
    """Whether another process keeps this one from locking a file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _met(told: Mapping[str, Any], rank: int, size: int) -> tuple[float, float | None]:
    """Seconds that an all-reduce takes by gloo, and by NCCL where every process has a GPU."""
    device = torch.device(told["device"])
    with init_process_group(RankSpec(rank, size, told["address"]), device=device, timeout_s=LIMIT_S):
        gloo_s = _measured(rank, size, torch.device("cpu"))
        return gloo_s, _measured(rank, size, device) if device.type == "cuda" else None


def _call(folder: Path, size: int) -> None:
    """Say where all meet, once all have come: nothing listens before."""
    names = [f"came-{rank}.json" for rank in range(size)]
    _wait_for(folder, 0, names)
    gpus = all(_read(folder / name)["gpu"] for name in names)
    address = rendezvous_port(own_address()) if "SLURM_JOB_ID" in os.environ else rendezvous_file(folder)
    write_json(folder / MEETING, {"address": address, "device": "cuda" if gpus else "cpu"})


def _measured(rank: int, size: int, device: torch.device) -> float:
    """Seconds of one all-reduce of 4 MB between connected processes. Raises ``RunFailed`` where its sum is wrong."""
    pattern = torch.arange(NUMBERS, device=device) % PERIOD + 1.0
    numbers = pattern * (rank + 1)
    dist.all_reduce(torch.zeros(1, device=device))
    _finish(device)
    began = time.perf_counter()
    dist.all_reduce(numbers)
    _finish(device)
    seconds = time.perf_counter() - began
    if not torch.equal(numbers, pattern * (size * (size + 1) / 2)):
        raise RunFailed(f"the sum over {size} processes on {device.type} is wrong")
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wait_for(folder: Path, rank: int, names: list[str]) -> None:
    """Until files are in the folder; how long is for the alarm to say."""
    while not set(names) <= names_in(folder, me=str(rank)):
        time.sleep(BETWEEN_LOOKS_S)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except FileNotFoundError:
        return {}
