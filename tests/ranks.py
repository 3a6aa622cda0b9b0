"""Real processes as ranks: forked from one process that has imported torch, so that a world starts in a second."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modis_dist.train.process_group import RankSpec, init_process_group, rendezvous_file

LIMIT_S = 120.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.nn", "modis_dist.train.loop", "tests.train.toy"])


def on_ranks(
    size: int, work: Callable[..., Any], folder: Path, *arguments: Any, timeout_s: float = 60.0, device: str = "cpu"
) -> list[Any]:
    """``work(world, folder, *arguments)`` on every rank; the results by rank. An error on any rank is raised here.

    A rank alone talks to itself through a process group all the same: nccl for a GPU, of which a machine may have one.
    """
    processes, pipes = start(size, work, folder, *arguments, timeout_s=timeout_s, device=device)
    found = answers(pipes)
    for process in processes:
        process.join(LIMIT_S)
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in found]


def answers(pipes: list[Any]) -> list[tuple[Any, str | None]]:
    """Result and error of every rank; "died" where it left without a word."""
    found = []
    for pipe in pipes:
        try:
            found.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(LIMIT_S) else (None, "no answer"))
        except EOFError:
            found.append((None, "died"))
    return found


def start(
    size: int, work: Callable[..., Any], folder: Path, *arguments: Any, timeout_s: float = 60.0, device: str = "cpu"
) -> tuple[Any, Any]:
    """The processes of a world and the pipe to each, on which it sends its result and error."""
    folder.mkdir(parents=True, exist_ok=True)
    held = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CONTEXT.Process(
            target=_live,
            args=(
                RankSpec(rank, size, rendezvous_file(folder)),
                work,
                folder,
                arguments,
                held[rank][1],
                timeout_s,
                device,
            ),
            daemon=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, writer in held:
        writer.close()
    return processes, [reader for reader, _ in held]


def _live(seat: RankSpec, work: Any, folder: Path, arguments: Any, pipe: Any, timeout_s: float, device: str) -> None:
    torch.set_num_threads(1)
    try:
        with init_process_group(seat, device=torch.device(device), timeout_s=timeout_s) as world:
            found = work(world, folder, *arguments)
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))
        return
    pipe.send_bytes(pickle.dumps((found, None)))  # tensors by value: this process does not stay to share them
