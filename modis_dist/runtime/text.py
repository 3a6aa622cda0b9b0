"""Text from users, data and files, made safe to show: in messages, in reports, in Markdown."""

import re
from collections.abc import Callable, Sequence

LINE_CHARACTERS, NAME_CHARACTERS = 200, 60


def shown(value: object) -> str:
    """Return a value as one line of ASCII for a message, so that look-alike names can be told apart."""
    text = value if isinstance(value, str) else repr(value)
    return _escaped(text, lambda letter: letter.isascii() and letter.isprintable(), limit=LINE_CHARACTERS)


def plain(name: object, *, limit: int = NAME_CHARACTERS) -> str:
    """Return a name as one line of printable characters for a report."""
    return _escaped(str(name), str.isprintable, limit=limit)


def markdown(line: str) -> str:
    """Return one line of text that Markdown and HTML show as it is."""
    entities = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|$~])", r"\\\1", entities)


def _escaped(text: str, keep: Callable[[str], bool], *, limit: int) -> str:
    """Escape the other characters, and cut in the middle: names of one gene panel begin alike."""
    escaped = "".join(letter if keep(letter) else letter.encode("unicode_escape").decode() for letter in text)
    if len(escaped) <= limit:
        return escaped
    end = (limit - 3) // 2
    return f"{escaped[: limit - 3 - end]}...{escaped[-end:]}"


def listed(names: Sequence[str], *, limit: int = 5) -> str:
    """Return the first names, escaped and separated by commas, and "..." if there are more."""
    return ", ".join(map(shown, names[:limit])) + ", ..." * (len(names) > limit)
