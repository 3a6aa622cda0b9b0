"""Run a function on several ranks, each a process forked from a server that has already imported torch."""

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
    """Return the result of ``work(world, folder, *arguments)`` by rank. Raises ``AssertionError`` if any rank fails.

    A single rank also uses a process group (nccl on a GPU).
    """
    processes, pipes = start(size, work, folder, *arguments, timeout_s=timeout_s, device=device)
    outcomes = receive_results(pipes)
    for process in processes:
        process.join(LIMIT_S)
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in outcomes]


def receive_results(pipes: list[Any]) -> list[tuple[Any, str | None]]:
    """Return result and error by rank; the error is "died" if a rank exited without sending a result."""
    outcomes = []
    for pipe in pipes:
        try:
            outcomes.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(LIMIT_S) else (None, "no answer"))
        except EOFError:
            outcomes.append((None, "died"))
    return outcomes


def start(
    size: int, work: Callable[..., Any], folder: Path, *arguments: Any, timeout_s: float = 60.0, device: str = "cpu"
) -> tuple[Any, Any]:
    """Start a process per rank; return the processes and the pipes on which they send result and error."""
    folder.mkdir(parents=True, exist_ok=True)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CONTEXT.Process(
            target=_live,
            args=(
                RankSpec(rank, size, rendezvous_file(folder)),
                work,
                folder,
                arguments,
                pipes[rank][1],
                timeout_s,
                device,
            ),
            daemon=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()
    return processes, [reader for reader, _ in pipes]


def _live(spec: RankSpec, work: Any, folder: Path, arguments: Any, pipe: Any, timeout_s: float, device: str) -> None:
    torch.set_num_threads(1)
    try:
        with init_process_group(spec, device=torch.device(device), timeout_s=timeout_s) as world:
            result = work(world, folder, *arguments)
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))
        return
    pipe.send_bytes(pickle.dumps((result, None)))  # pickled by value: shared tensors need a living sender
