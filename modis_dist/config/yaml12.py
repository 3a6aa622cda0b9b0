"""Strict YAML 1.2 reading and writing.

PyYAML resolves YAML 1.1, where ``1e-3`` is a string and ``NO`` is false. This loader resolves the core schema of YAML
1.2 and rejects tags, anchors and duplicate keys. Octal and hexadecimal numbers (``0o17``, ``0x1F``) stay text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.text import shown

MAX_BYTES = 1_000_000
MAX_DEPTH = 50


class _Rejected(Exception):
    """A construct that the strict loader does not accept."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema only."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Rejected(f"line {line}: anchors and aliases are not allowed")
        if getattr(event, "tag", None):
            raise _Rejected(f"line {line}: tag {shown(event.tag)} is not allowed")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise _Rejected(f"line {line}: nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _Rejected(f"line {node.start_mark.line + 1}: {shown(value)!r} contains a surrogate or NUL character")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Rejected(f"line {line}: a key must be plain text")
            if key.value in seen:
                raise _Rejected(f"line {line}: duplicate key {shown(key.value)!r} (first on line {seen[key.value]})")
            seen[key.value] = line
        pairs = super().construct_mapping(node, deep=True)
        return {str(key): value for key, value in pairs.items()}


_NUMBER_START = list("-+.0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), _NUMBER_START)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    _NUMBER_START,
)
# YAML 1.1 reads a leading 0 as octal; 1.2 reads decimal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Dumper whose output the strict loader reads back: strings that look like numbers are quoted."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Write repeated lists in full; the loader rejects anchors."""
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Double-quote text with unprintable characters such as Unicode line breaks, which only escapes preserve."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)


def parse(text: str, *, source: str) -> Any:
    """Return the value of a YAML 1.2 text; ``source`` names it in messages.

    Raises ``ConfigError`` for text that is not valid, plain YAML.
    """
    if "\0" in text:
        raise ConfigError(["contains a NUL byte; not a text file"], source=source)
    try:
        return _Loader(text.removeprefix("\ufeff")).get_single_data()
    except _Rejected as rejected:
        raise ConfigError([str(rejected)], source=source) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([f"{where}not valid YAML: {shown(problem)}"], source=source) from None


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file of at most 1 MB. Raises ``ConfigError``."""
    source = str(path)
    try:
        if not path.is_file():
            raise ConfigError(["no such file" if not path.exists() else "not a regular file"], source=source)
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError([f"larger than {MAX_BYTES} bytes; not a configuration file"], source=source)
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"not valid UTF-8 at byte {error.start}"], source=source) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], source=source) from None
    value = parse(text, source=source)
    if value is None:
        raise ConfigError(["empty; expected a mapping of keys"], source=source)
    if not isinstance(value, dict):
        raise ConfigError([f"contains a {type(value).__name__}; expected a mapping of keys"], source=source)
    return value


def dump(value: Any) -> str:
    """Return YAML text that ``parse`` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
