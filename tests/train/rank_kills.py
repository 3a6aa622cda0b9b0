"""Kills of a rank at exact points: at a step, or while rank 0 writes, with any rank as the victim.

As in ``tests.train.kills``, every start is forked from a process that has imported PyTorch, here as several ranks, each
of which announces its markers and waits for replies. After a kill the other ranks must exit; then all start again. The
final files must be bit-identical to those of uninterrupted ranks.
"""

import os
import random
import select
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from socket import socket, socketpair
from tempfile import TemporaryDirectory

from modis_dist.runtime.errors import RankLost
from modis_dist.train.loader import Loader
from modis_dist.train.process_group import RankSpec, rendezvous_file
from tests.train import toy
from tests.train.kills import GO, KINDS, Announcer, Tally, compared, train_and_exit

LIMIT_S = 60.0  # within which a rank must exit after another was killed
KILLS_OF_A_TRAINING = 5
UNEVEN = "optim.batch_size=7"  # cannot be divided equally between two ranks
TRAINED = ("class_conditional, penalty of each", "stack of pairwise, early stopping")


@dataclass(frozen=True)
class Aim:
    """A rank to kill when it, or another rank, reaches a marker."""

    marker: str
    victim: int


class Ranks:
    """One kind of training on several ranks: the files of an uninterrupted training, and the markers that it passes."""

    def __init__(self, name: str, *, size: int, store: Path, folder: Path) -> None:
        self.name = name
        self.runs = [toy.run(*overrides, UNEVEN, f"data.store={store}") for overrides in KINDS[name]]
        self.size = size
        self.store = store
        self.folder = folder
        folder.mkdir()
        self.uninterrupted = folder / "uninterrupted"
        self.markers: list[str] = []
        self.start(self.uninterrupted, None, self.markers.append)
        self._number = 0

    def interrupted(self, chance: random.Random, tally: Tally, *, kills: int) -> None:
        """Run one training to its end with up to ``kills`` kills; add its differences to the tally."""
        self._number += 1
        out = self.folder / f"interrupted{self._number}"
        aims = self._aims(chance, kills)
        for aim in (*aims, None):
            ended = self.start(out, aim)
            tally.lives += 1
            tally.kills += -signal.SIGKILL in ended
            if ended[0] == 0:
                break
        tally.runs += 1
        tally.differences += [f"{self.name}, killed at {aims}: {what}" for what in compared(out, self.uninterrupted)]
        shutil.rmtree(out)

    def _aims(self, chance: random.Random, kills: int) -> list[Aim]:
        """Return aims in the order of a training, half of them during writes of rank 0, with any rank as the victim."""
        steps = [index for index, marker in enumerate(self.markers) if _is_step(marker)]
        writes = [index for index, marker in enumerate(self.markers) if not _is_step(marker)]
        places = sorted(chance.choice(chance.choice((steps, writes))) for _ in range(kills))
        return [Aim(self.markers[index], chance.randrange(self.size)) for index in places]

    def start(self, out: Path, aim: Aim | None, noted: Callable[[str], object] = lambda _: None) -> list[int]:
        """Start the ranks, reply to their markers and kill at the aim; return the exit code of every rank."""
        with TemporaryDirectory(dir=self.folder) as rendezvous:
            pairs = [socketpair() for _ in range(self.size)]
            children = [self._fork(rank, Path(rendezvous), out, pairs) for rank in range(self.size)]
            for _, child_end in pairs:
                child_end.close()
            killed = _reply([parent_end for parent_end, _ in pairs], children, aim, noted)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for rank, code in enumerate(codes):
            expected_code = -signal.SIGKILL if aim and rank == aim.victim else RankLost.exit_code
            assert code in ({0, expected_code} if killed else {0}), f"{self.name}, {aim}: rank {rank} ended with {code}"
        return codes

    def _fork(self, rank: int, rendezvous: Path, out: Path, pairs: list[tuple[socket, socket]]) -> int:
        child = os.fork()
        if child == 0:
            connection = pairs[rank][1]
            for end in (pipe_end for pair in pairs for pipe_end in pair if pipe_end is not connection):
                end.close()
            at = Announcer(connection.fileno(), connection.fileno())
            _announce_steps(rank, at)
            train_and_exit(self.runs, self.store, out, at, RankSpec(rank, self.size, rendezvous_file(rendezvous)))
        return child


def _is_step(marker: str) -> bool:
    return marker.startswith("rank ")


def _reply(sockets: list[socket], children: list[int], aim: Aim | None, noted: Callable[[str], object]) -> bool:
    """Reply to ranks until all have ended; return True if a rank was killed, at most once.

    Raises ``AssertionError`` if ranks neither end nor announce anything, after killing all of them.
    """
    pending, killed = list(sockets), False
    while pending:
        ready, _, _ = select.select(pending, [], [], LIMIT_S)
        if not ready:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"{aim}: ranks {[sockets.index(connection) for connection in pending]} do not exit")
        for connection in ready:
            marker = _read_marker(connection)
            if not marker:
                pending.remove(connection)
                connection.close()
                continue
            noted(marker)
            if not killed and aim is not None and marker == aim.marker:
                os.kill(children[aim.victim], signal.SIGKILL)
                killed = True
            with suppress(BrokenPipeError):  # of the victim
                connection.send(GO)
    return killed


def _read_marker(connection: socket) -> str:
    """Return the next marker, or an empty string if the rank has ended."""
    with suppress(ConnectionResetError):
        return connection.recv(4096).decode().rstrip("\n")
    return ""


def soak(kills: int, *, seed: int, folder: Path, store: Path, size: int, report: Callable[[Tally], None]) -> Tally:
    """Disturb trainings on ``size`` ranks until ``kills`` kills are done; ``report`` is called after every training."""
    tally, chance = Tally(), random.Random(seed)
    kinds = [Ranks(name, size=size, store=store, folder=folder / str(n)) for n, name in enumerate(TRAINED)]
    for kind in cycle(kinds):
        if tally.kills >= kills:
            break
        kind.interrupted(chance, tally, kills=min(KILLS_OF_A_TRAINING, kills - tally.kills))
        report(tally)
    return tally


def _announce_steps(rank: int, at: Announcer) -> None:
    """Announce every step of this rank, in its process."""
    batch = Loader.batch

    def announced(self: Loader, *, epoch: int, step: int) -> object:
        at(f"rank {rank}: epoch {epoch} step {step}")
        return batch(self, epoch=epoch, step=step)

    Loader.batch = announced
