"""What ``modis-dist doctor`` says of one thing. Knows nothing of the things themselves."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    level: Level
    found: str
    advice: str = ""  # what to do; empty where all is well


def judged(what: str, found: str, *, unless: bool, advice: str, level: Level = "bad") -> Finding:
    """A good finding where a condition holds, otherwise one of some level with its advice."""
    return Finding(what, "good", found) if unless else Finding(what, level, found, advice)
