"""Errors of commands and their exit codes.

Every message is one line: the location (file, key, row), the problem, the cause, the fix.
"""

from functools import partial
from typing import Any, ClassVar

from modis_dist.runtime.text import shown

MAX_MISTAKES = 20


def nearest(name: str, candidates: list[str]) -> str:
    """Return `; did you mean 'x'?` for the closest candidate, or nothing."""
    from difflib import get_close_matches

    match = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean '{shown(match[0])}'?" if match else ""


class ModisError(Exception):
    """Base of the errors of this package."""

    exit_code: ClassVar[int] = 70


class UserError(ModisError, ValueError):
    """A mistake the user can fix; nothing was started and nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """Mistakes in a YAML file or an override; several are numbered on one line."""

    def __init__(self, problems: list[str], *, source: str) -> None:
        self.problems = problems
        self.source = source
        message = problems[0]
        if len(problems) > 1:
            numbered = [f"({number}) {problem}" for number, problem in enumerate(problems[:MAX_MISTAKES], start=1)]
            more = [f"and {len(problems) - MAX_MISTAKES} more"] if len(problems) > MAX_MISTAKES else []
            message = f"{len(problems)} mistakes: " + "  ".join(numbered + more)
        super().__init__(f"{shown(source)}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the problems too; by default only the message is pickled."""
        return partial(ConfigError, source=self.source), (self.problems,)


class DataError(UserError):
    """A mistake in a data file, a store or a checkpoint."""


class RunFailed(ModisError):
    """A training failed and can be resumed or fixed; names step, term and checkpoint."""

    exit_code = 3


class RankLost(RunFailed):
    """A rank of a training does not answer; the others have stopped, and all can resume together."""


class DiskFailed(RunFailed):
    """The disk is full or fails; once that is fixed, the same command resumes."""


class MachineFailed(RunFailed):
    """The machine failed, not the training; a later start, or one on another machine, may succeed."""


class NodeFailed(MachineFailed):
    """This node is unusable: a GPU is missing or broken."""


class SweepIncomplete(ModisError):
    """A sweep ended with failed trials; the results of the others are kept."""

    exit_code = 4


class Interrupted(ModisError):
    """Stopped by a signal, with the state saved; the same command resumes."""

    exit_code = 75
