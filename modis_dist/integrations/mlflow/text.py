"""Names and values in the form that MLflow accepts. Pure functions without MLflow."""

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from typing import Any

MAX_VALUE = 500  # limit of the strictest servers
MAX_NAME = 250


def key(name: str) -> str:
    """Return a metric or parameter name that MLflow accepts; a changed name ends in a hash and stays unique."""
    clean = posixpath.normpath(re.sub(r"[^\w.\- /]", "_", name)).lstrip("./ ")
    if clean and clean == name and len(name) <= MAX_NAME:
        return name
    return f"{clean[: MAX_NAME - 9]}-{_hash(name)[:8]}".lstrip("-")


def value(content: Any) -> str:
    """Return the text of a parameter or tag, at most 500 characters; a longer one is cut and ends in its hash."""
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    if len(text) <= MAX_VALUE:
        return text
    return f"{text[: MAX_VALUE - 30]}... sha256:{_hash(text)[:16]}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the parameters of a nested tree by dotted key."""
    params: dict[str, str] = {}
    for name, content in tree.items():
        if isinstance(content, Mapping):
            params |= flat(content, f"{prefix}{name}.")
        else:
            params[key(f"{prefix}{name}")] = value(content)
    return params


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
