"""A finding of ``modis-dist doctor``."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    level: Level
    found: str
    advice: str = ""  # what to do; empty if all is well


def judged(what: str, found: str, *, unless: bool, advice: str, level: Level = "bad") -> Finding:
    """Return a good finding if a condition holds, otherwise one of a level with its advice."""
    return Finding(what, "good", found) if unless else Finding(what, level, found, advice)
