"""What the keys of a study or a profile are and mean, read off the typed tree. Knows nothing of values or files."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modis_dist.config.run import Run
from modis_dist.config.study import Study
from modis_dist.runtime.errors import ConfigError, nearest, shown

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "any value"}
SLIP = 0.8  # likeness of two words, of 1
SIGNS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


@dataclass(frozen=True)
class Key:
    """One key of one section; ``kind`` is the kind of step that has it, where the section is one of several."""

    path: str
    kind: str | None
    field: FieldInfo


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every section class that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def kind_of(model: type[BaseModel]) -> str | None:
    """The value of `kind` that chooses this section, or None."""
    field = model.model_fields.get("kind")
    return str(field.default) if field else None


def every_key(section: type[BaseModel] = Study, *, path: str = "", kind: str | None = None) -> Iterator[Key]:
    """Every key of a tree; names that the user chooses (of modalities, conditions) are not part of its path."""
    for name, field in section.model_fields.items():
        here = f"{path}{name}"
        yield Key(here, kind, field)
        below = models_in(field.annotation)
        for model in below:
            yield from every_key(model, path=f"{here}.", kind=kind_of(model) if len(below) > 1 else kind)


def alike(name: str, candidates: list[str]) -> list[str]:
    """The candidates that differ by a slip: more telling than the same word in another section."""
    return get_close_matches(name, candidates, cutoff=SLIP)


def elsewhere(key: str, section: type[BaseModel] = Study) -> str:
    """`"; did you mean 'optim.lr'?"` for a key whose last part stands in another section, or nothing."""
    paths = dict.fromkeys(found.path for found in every_key(section))
    known = [f"'{path}'" for path in paths if path.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and path != key]
    return f"; did you mean {' or '.join(known[:3])}?" if known else ""


def is_whole(key: str) -> bool:
    """Whether the values of a dotted key of a run are whole numbers."""
    known = list(every_key(Run))
    path = _without_names(key, known)
    kinds = {kind for entry in known if entry.path == path for kind in _scalars(entry.field.annotation)}
    return int in kinds and float not in kinds


def _scalars(annotation: Any) -> set[Any]:
    """The types of single values that an annotation allows."""
    if get_origin(annotation) in {tuple, dict, Literal}:
        return set()
    below = get_args(annotation)
    return {kind for argument in below for kind in _scalars(argument)} if below else {annotation}


# --- explanations ---------------------------------------------------------------------------------------------


def explain(key: str, tree: type[BaseModel] = Study) -> str:
    """Meaning, type, unit, default and range of one dotted key of a tree, and what stands below it.

    Raises ``ConfigError`` for an unknown key.
    """
    known = list(every_key(tree))
    key = _without_names(key, known)
    of_kind = _of_kind(key, known)
    if of_kind:
        return "\n".join([key, *_of_one_kind(of_kind)])
    found = [entry for entry in known if entry.path == key]
    if not found:
        hint = nearest(key, _siblings(key, known)) or elsewhere(key, tree)
        hint = hint or nearest(key, [entry.path for entry in known]) or "; known: " + ", ".join(tree.model_fields)
        raise ConfigError([f"{shown(key)}: unknown key{hint}"], source="--explain")
    lines = [key]
    for kinds, field in _alike(found):
        lines += [f"  {kinds}{field.description}", *(f"    {name + ':':<9}{fact}" for name, fact in _facts(field))]
    below = [entry for entry in known if entry.path.startswith(key + ".") and "." not in entry.path[len(key) + 1 :]]
    return "\n".join([*lines, *_listed(below)])


def _without_names(key: str, known: list[Key]) -> str:
    """The key without what the user named in it: modalities, conditions, and the keys of a run that a sweep sets."""
    if any(entry.path == key for entry in known):
        return key
    for entry in known:
        start = f"{entry.path}."
        if not key.startswith(start) or get_origin(entry.field.annotation) is not dict:
            continue
        rest = key.removeprefix(start)
        if entry.path in {"sweep.grid", "sweep.space"}:
            return rest
        below = rest.partition(".")[2]
        if entry.path == "sweep.conditions":
            return below or entry.path
        return f"{start}{below}" if below else entry.path
    return key


def _of_kind(key: str, known: list[Key]) -> list[Key]:
    """The keys of the steps of one kind, for a key like ``scenario.hide_labels``."""
    section, _, kind = key.rpartition(".")
    return [entry for entry in known if entry.kind == kind and entry.path.rpartition(".")[0] == section]


def _of_one_kind(keys: list[Key]) -> list[str]:
    lines = [f"  {entry.field.description}" for entry in keys if _last(entry) == "kind"]
    for entry in keys:
        if _last(entry) != "kind":
            facts = _facts(entry.field)
            lines += [f"  {_last(entry)}: {entry.field.description}"]
            lines += [f"    {name + ':':<9}{fact}" for name, fact in facts]
    return lines


def _siblings(key: str, known: list[Key]) -> list[str]:
    """The keys of the section that a key was looked for in that are much like it."""
    section, _, last = key.rpartition(".")
    parts = [entry.path.rpartition(".") for entry in known]
    return [f"{section}.{name}".lstrip(".") for name in alike(last, [p[2] for p in parts if p[0] == section])]


def _alike(found: list[Key]) -> list[tuple[str, FieldInfo]]:
    """Each different meaning of a key once, headed by the kinds of step that share it."""
    sharing: dict[str, list[Key]] = {}
    for entry in found:
        sharing.setdefault(repr(entry.field), []).append(entry)
    return [
        (", ".join(entry.kind for entry in alike if entry.kind) + ": " if alike[0].kind else "", alike[0].field)
        for alike in sharing.values()
    ]


def _listed(below: list[Key]) -> list[str]:
    """The keys of a section, or the kinds of step of a list with their keys, one a line."""
    meant = {_last(entry): str(entry.field.description) for entry in below if entry.kind is None}
    for entry in below:
        if entry.kind and _last(entry) == "kind":
            keys = [_last(other) for other in below if other.kind == entry.kind and other is not entry]
            meant[entry.kind] = f"{entry.field.description}" + (f" (keys: {', '.join(keys)})" if keys else "")
    if not meant and below:
        meant = {_last(entry): str(entry.field.description) for entry in below}
    width = max(map(len, meant), default=0)
    title = "kinds:" if any(entry.kind and _last(entry) == "kind" for entry in below) else "keys:"
    return ["", f"  {title}", *(f"    {name:<{width}}  {meaning}" for name, meaning in meant.items())] if meant else []


def _last(entry: Key) -> str:
    return entry.path.rsplit(".", 1)[-1]


def _facts(field: FieldInfo) -> list[tuple[str, str]]:
    extra = field.json_schema_extra
    facts = {
        "type": _words(field.annotation),
        "unit": str(extra.get("unit")) if isinstance(extra, dict) else "",
        "range": " and ".join(dict.fromkeys([*_limits(field.metadata), *_limits_in(field.annotation)])),
        "length": "".join(f"at least {m.min_length}" for m in field.metadata if type(m) is MinLen),
        "default": "none; the key is required" if field.is_required() else _plain(field.default),
    }
    return [(name, fact) for name, fact in facts.items() if fact]


def _limits(metadata: list[Any]) -> list[str]:
    found = [(*SIGNS[type(m)], m) for m in metadata if type(m) in SIGNS]
    return [f"{sign} {_plain(getattr(m, name))}" for sign, name, m in found]


def _limits_in(annotation: Any) -> list[str]:
    """Limits of the values inside a list or of an alternative to none."""
    if models_in(annotation):
        return []
    own = _limits(annotation.__metadata__[0].metadata) if _is_field(annotation) else []
    return own + [limit for argument in get_args(annotation)[:1] for limit in _limits_in(argument)]


def _is_field(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated and isinstance(annotation.__metadata__[0], FieldInfo)


def _words(annotation: Any) -> str:
    """A type in a reader's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    models = models_in(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return " or ".join(str(value) for value in arguments) if len(arguments) > 1 else f"the word {arguments[0]}"
    if origin is tuple:
        return "a list of steps" if len(models) > 1 else f"a list, each {_words(arguments[0])}"
    if origin is dict:
        return f"names, each with {_words(arguments[1])}"
    if models and NoneType not in arguments:
        return "a section" if len(models) == 1 else "a section with `kind`, or its kind alone"
    return WORDS.get(annotation) or " or ".join(
        "none" if argument is NoneType else _words(argument) for argument in arguments
    )


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return kind_of(type(value)) or "see the keys below"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "none", "{}": "no names"}.get(str(value), str(value))
