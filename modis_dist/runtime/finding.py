"""Result of one readiness check, with a fix for a problem. Independent of the checks."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    level: Level
    message: str
    fix: str = ""  # empty if the level is ok

    @classmethod
    def of(cls, check: str, message: str, *, ok: bool, fix: str, level: Level = "error") -> "Finding":
        """Return an ok finding, or one of the level with its fix."""
        return cls(check, "ok", message) if ok else cls(check, level, message, fix)
