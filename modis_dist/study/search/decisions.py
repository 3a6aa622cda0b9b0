"""What a sweep decided, once, in the file ``decisions.json``: written before it is acted on, and kept to afterwards.

A decision belongs to what it was made about (settings and trials, as plain values); about the same it is never made
again, so that a sweep that was killed goes on as it would have.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modis_dist.config.parse import digest
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json

FILE = "decisions.json"
VERSION = 1

Plain = Mapping[str, Any]


def decided(out: Path, about: Plain) -> dict[str, Any] | None:
    """What was decided about something, or None. Raises ``DataError`` where the file is damaged."""
    wanted = digest(about)
    return next((one["decided"] for one in _read(out) if digest(one["about"]) == wanted), None)


def decide(out: Path, about: Plain, decision: Plain) -> dict[str, Any]:
    """Write a decision down, and return it as it is read back."""
    assert decided(out, about) is None, "a decision is made once"
    made = {"about": about, "decided": decision, "sha256": digest([about, decision])}
    write_json(out / FILE, {"version": VERSION, "decisions": [*_read(out), made]})
    held = decided(out, about)
    assert held is not None
    return held


def _read(out: Path) -> list[dict[str, Any]]:
    path = out / FILE
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(f"{path}: format version {content['version']}; this program reads version {VERSION}")
        made: list[dict[str, Any]] = content["decisions"]
        wrong = [n for n, one in enumerate(made) if one["sha256"] != digest([one["about"], one["decided"]])]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is not the record of a sweep's decisions ({type(error).__name__})") from None
    if wrong:
        raise DataError(f"{path}: decision {wrong[0]} does not match its checksum; restore it or use another --out")
    return made
