"""Several ranks that train one stack over gloo on this machine, each a process with one thread, driven by pipes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from modis_dist.train.process_group import RankSpec, join_process_group, rendezvous_file
from tools.bench import ours
from tools.bench.measure import Work
from tools.bench.shapes import Setting

SPAWN = get_context("spawn")


@contextmanager
def stepping(setting: Setting, *, size: int) -> Iterator[Work]:
    """Yield the work of ``size`` ranks, which block on a pipe between calls and end with the context."""
    with tempfile.TemporaryDirectory() as folder:
        specs = [RankSpec(rank, size, rendezvous_file(Path(folder))) for rank in range(size)]
        pipes = [SPAWN.Pipe() for _ in specs]
        processes = [
            SPAWN.Process(target=_serve, args=(theirs, spec, setting), daemon=True)
            for (_, theirs), spec in zip(pipes, specs, strict=True)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        connections = [mine for mine, _ in pipes]
        _await(connections)  # ready
        yield lambda times: _ask(connections, times)
        for pipe in connections:
            pipe.send(0)
        for process in processes:
            process.join()


def _ask(pipes: list[Connection], steps: int) -> None:
    for pipe in pipes:
        pipe.send(steps)
    _await(pipes)


def _await(pipes: list[Connection]) -> None:
    """Wait until every rank is done. Raises ``EOFError`` if a rank has died."""
    for pipe in pipes:
        pipe.recv()


def _serve(pipe: Connection, spec: RankSpec, setting: Setting) -> None:
    torch.set_num_threads(1)
    with join_process_group(spec, device=setting.device) as world:
        training = ours.Training(setting, world=world)
        batch = ours.random_batch(setting, world=world)
        pipe.send(True)
        while steps := pipe.recv():
            for _ in range(steps):
                training.learn(batch)
            pipe.send(True)
