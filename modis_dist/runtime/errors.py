"""The errors a command can end with, and the exit code of each.

Every message a user sees is one line: what is wrong, where (file, key, row), why, what to do.
"""

from functools import partial
from typing import Any, ClassVar

from modis_dist.runtime.text import shown as shown

MAX_MISTAKES = 20


def nearest(name: str, candidates: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest candidate, or nothing."""
    from difflib import get_close_matches

    match = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean '{shown(match[0])}'?" if match else ""


class ModisError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code: ClassVar[int] = 70


class UserError(ModisError, ValueError):
    """Something the user can mend; nothing was started and nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """A mistake in a YAML file or an override; holds every mistake found, numbered on one line where there are many."""

    def __init__(self, problems: list[str], *, source: str) -> None:
        self.problems = problems
        self.source = source
        super().__init__(f"{shown(source)}: {_numbered(problems)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent from one process to another, it would be made from its message alone."""
        return partial(ConfigError, source=self.source), (self.problems,)


def _numbered(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    told = [f"({number}) {problem}" for number, problem in enumerate(problems[:MAX_MISTAKES], start=1)]
    more = [f"and {len(problems) - MAX_MISTAKES} more"] if len(problems) > MAX_MISTAKES else []
    return f"{len(problems)} mistakes: " + "  ".join(told + more)


class DataError(UserError):
    """A mistake in a data file, a store or a checkpoint."""


class RunFailed(ModisError):
    """A training stopped and can be resumed or mended; names step, term and checkpoint."""

    exit_code = 3


class RankLost(RunFailed):
    """A rank of a training does not answer; those that noticed have stopped, and all can continue together."""


class DiskFailed(RunFailed):
    """The disk refuses; once it is mended, or has room, the same command continues."""


class MachineFailed(RunFailed):
    """Not the training failed but what it ran on; a later start, or one elsewhere, may go on."""


class NodeFailed(MachineFailed):
    """This very machine is not fit: a GPU is missing or broken."""


class SweepIncomplete(ModisError):
    """A sweep ended with failed trials; the others are finished and kept."""

    exit_code = 4


class Interrupted(ModisError):
    """Stopped by a signal with its state saved; the same command continues."""

    exit_code = 75
