"""The version of the package and the hash of its source, for files to record."""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parents[1]


@cache
def code() -> str:
    """Return the hash of the package's source: a job that starts days later may run another."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()[:16]
