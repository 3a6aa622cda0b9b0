"""Decisions of a search in ``decisions.json``: each is written before it takes effect, and made only once.

A decision is stored with its subject (settings and trials, as plain values). A resumed search reads the decision on the
same subject instead of making it again, so it continues as if it had not been interrupted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from modis_dist.config.parse import digest
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json

FILE = "decisions.json"
VERSION = 2

JsonObject = Mapping[str, Any]


class Entry(TypedDict):
    """A decision with its subject; ``sha256`` is the checksum of both."""

    subject: JsonObject
    decision: Any
    sha256: str


def stored_decision(out: Path, subject: JsonObject) -> Any | None:
    """Return the decision about a subject, or None. Raises ``DataError`` if the file is damaged."""
    key = digest(subject)
    return next((entry["decision"] for entry in _read(out) if digest(entry["subject"]) == key), None)


def record_decision(out: Path, subject: JsonObject, decision: JsonObject) -> Any:
    """Write a decision; return it as read back from the file."""
    assert stored_decision(out, subject) is None, "a decision is made once"
    entry: Entry = {"subject": subject, "decision": decision, "sha256": digest([subject, decision])}
    write_json(out / FILE, {"version": VERSION, "decisions": [*_read(out), entry]})
    written = stored_decision(out, subject)
    assert written is not None
    return written


def _read(out: Path) -> list[Entry]:
    path = out / FILE
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(f"{path}: format version {content['version']}; this program reads version {VERSION}")
        entries: list[Entry] = content["decisions"]
        for number, entry in enumerate(entries):
            if entry["sha256"] != digest([entry["subject"], entry["decision"]]):
                problem = f"decision {number} does not match its checksum; restore it or use another --out"
                raise DataError(f"{path}: {problem}")
        return entries
    except FileNotFoundError:
        return []
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a file of search decisions ({type(error).__name__})") from None
