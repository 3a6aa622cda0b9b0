"""One process of doctor's all-reduce check: time an all-reduce over all processes, and test a lock between them.

The processes find each other in a shared folder: each writes a file when it starts and one when it is done, which shows
whether a process did not start or could not connect. Slurm sets rank and world size; on one machine doctor sets the
same variables. Slurm tasks connect over the network, like the ranks of a training; others connect over loopback.
"""

import fcntl
import json
import os
import signal
import socket
import time
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
PERIOD = 7  # small integers, whose sums over two thousand ranks are exact in float32
POLL_S = 0.1
RENDEZVOUS, LOCK = "rendezvous.json", "lock"


@dataclass(frozen=True)
class RankResult:
    """Result of one process."""

    host: str
    gloo_s: float = 0.0
    nccl_s: float | None = None  # None unless every process has a GPU
    error: str = ""
    excluded: bool | None = None  # true if a lock of rank 0 excluded this process; None if not tried


@dataclass(frozen=True)
class AllReduceResult:
    """Results by rank, as far as the processes have written them."""

    started: dict[int, str]  # host names
    done: dict[int, RankResult]


def run_rank(folder: Path) -> None:
    """Run the all-reduce as one of the processes; an alarm ends it after the time limit."""
    signal.alarm(LIMIT_S)
    rank, size = _rank_and_size()
    host = socket.gethostname()
    try:
        with (folder / LOCK).open("a") as lock:
            if rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX)  # held until all processes are done
            write_json(folder / f"started-{rank}.json", {"host": host, "gpu": torch.cuda.is_available()})
            if rank == 0:
                _open_rendezvous(folder, size)
            _wait_for(folder, rank, [RENDEZVOUS])
            rendezvous = _read(folder / RENDEZVOUS)
            excluded = _is_locked(lock) if rank else None
            gloo_s, nccl_s = _times(rendezvous["address"], torch.device(rendezvous["device"]), rank, size)
        done = RankResult(host, gloo_s, nccl_s, excluded=excluded)
    except Exception as error:
        write_json(folder / f"done-{rank}.json", asdict(RankResult(host, error=f"{type(error).__name__}: {error}")))
        raise
    write_json(folder / f"done-{rank}.json", asdict(done))
    signal.alarm(0)


def read_all_reduce(folder: Path, size: int) -> AllReduceResult:
    """Return what the processes have written so far."""
    started = {rank: _read(folder / f"started-{rank}.json") for rank in range(size)}
    done = {rank: _read(folder / f"done-{rank}.json") for rank in range(size)}
    return AllReduceResult(
        {rank: str(content["host"]) for rank, content in started.items() if content},
        {rank: RankResult(**content) for rank, content in done.items() if content},
    )


def _rank_and_size() -> tuple[int, int]:
    try:
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    except (KeyError, ValueError):
        raise UserError("job all-reduce: not a step of a Slurm job; run `modis-dist doctor` instead") from None


def _open_rendezvous(folder: Path, size: int) -> None:
    """Write the address and device once all processes have started; no port is opened before."""
    names = [f"started-{rank}.json" for rank in range(size)]
    _wait_for(folder, 0, names)
    gpus = all(_read(folder / name)["gpu"] for name in names)
    address = rendezvous_port(own_address()) if "SLURM_JOB_ID" in os.environ else rendezvous_file(folder)
    write_json(folder / RENDEZVOUS, {"address": address, "device": "cuda" if gpus else "cpu"})


def _is_locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _times(address: str, device: torch.device, rank: int, size: int) -> tuple[float, float | None]:
    """Return the seconds of an all-reduce by gloo, and by NCCL if every process has a GPU."""
    with init_process_group(RankSpec(rank, size, address), device=device, timeout_s=LIMIT_S):
        gloo_s = _time(rank, size, torch.device("cpu"))
        return gloo_s, _time(rank, size, device) if device.type == "cuda" else None


def _time(rank: int, size: int, device: torch.device) -> float:
    """Return the seconds of one all-reduce between connected processes. Raises ``RunFailed`` if its sum is wrong."""
    pattern = torch.arange(NUMBERS, device=device) % PERIOD + 1.0
    numbers = pattern * (rank + 1)
    dist.all_reduce(torch.zeros(1, device=device))
    _synchronize(device)
    start = time.perf_counter()
    dist.all_reduce(numbers)
    _synchronize(device)
    seconds = time.perf_counter() - start
    if not torch.equal(numbers, pattern * (size * (size + 1) / 2)):
        raise RunFailed(f"the sum over {size} processes on {device.type} is wrong")
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wait_for(folder: Path, rank: int, names: list[str]) -> None:
    """Wait until files exist; the alarm limits the time."""
    while not set(names) <= names_in(folder, me=str(rank)):
        time.sleep(POLL_S)


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping in a file; empty if there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except FileNotFoundError:
        return {}
