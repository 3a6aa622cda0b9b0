"""Lookup and explanation of the configuration keys of a study or a site profile, from the typed tree alone."""

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
from modis_dist.runtime.errors import ConfigError, nearest
from modis_dist.runtime.text import shown

WORDS = {int: "integer", float: "number", bool: "true or false", str: "string", Any: "any value"}
TYPO_CUTOFF = 0.8  # similarity ratio of difflib
SIGNS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


@dataclass(frozen=True)
class Key:
    """One key of one section; ``kind`` is the step kind that it belongs to, where a list has several kinds of step."""

    path: str
    kind: str | None
    field: FieldInfo


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return every section class in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def kind_of(model: type[BaseModel]) -> str | None:
    """Return the value of `kind` that selects this section, or None."""
    field = model.model_fields.get("kind")
    return str(field.default) if field else None


def every_key(section: type[BaseModel] = Study, *, path: str = "", kind: str | None = None) -> Iterator[Key]:
    """Yield every key of a tree; paths leave out names that the user chooses (modalities, conditions)."""
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        yield Key(key, kind, field)
        subsections = models_in(field.annotation)
        for model in subsections:
            yield from every_key(model, path=f"{key}.", kind=kind_of(model) if len(subsections) > 1 else kind)


def likely_typos(name: str, candidates: list[str]) -> list[str]:
    """Return the candidates that ``name`` is probably a typo of."""
    return get_close_matches(name, candidates, cutoff=TYPO_CUTOFF)


def other_section_hint(key: str, section: type[BaseModel] = Study) -> str:
    """Return `"; did you mean 'optim.lr'?"` if another section has a key of the same name, else an empty string."""
    paths = dict.fromkeys(entry.path for entry in every_key(section))
    known = [f"'{path}'" for path in paths if path.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and path != key]
    return f"; did you mean {' or '.join(known[:3])}?" if known else ""


def is_whole(key: str) -> bool:
    """Return True if a dotted key of a run takes integers only."""
    known = list(every_key(Run))
    path = _without_names(key, known)
    kinds = {kind for entry in known if entry.path == path for kind in _scalars(entry.field.annotation)}
    return int in kinds and float not in kinds


def _scalars(annotation: Any) -> set[Any]:
    """Return the scalar types that an annotation allows."""
    if get_origin(annotation) in {tuple, dict, Literal}:
        return set()
    arguments = get_args(annotation)
    return {kind for argument in arguments for kind in _scalars(argument)} if arguments else {annotation}


# --- explanations ---------------------------------------------------------------------------------------------


def explain(key: str, tree: type[BaseModel] = Study) -> str:
    """Return meaning, type, unit, default and range of one dotted key, and the keys of a section.

    Raises ``ConfigError`` for an unknown key.
    """
    known = list(every_key(tree))
    key = _without_names(key, known)
    section, _, kind = key.rpartition(".")
    steps = [entry for entry in known if entry.kind == kind and entry.path.rpartition(".")[0] == section]
    if steps:  # a kind of step, such as ``scenario.hide_labels``
        return "\n".join([key, *_explained_step(steps)])
    entries = [entry for entry in known if entry.path == key]
    if not entries:
        hint = nearest(key, _siblings(key, known)) or other_section_hint(key, tree)
        hint = hint or nearest(key, [entry.path for entry in known]) or "; known: " + ", ".join(tree.model_fields)
        raise ConfigError([f"{shown(key)}: unknown key{hint}"], source="--explain")
    lines = [key]
    for kinds, field in _by_meaning(entries):
        lines += [f"  {kinds}{field.description}", *_facts(field)]
    below = [entry for entry in known if entry.path.startswith(key + ".") and "." not in entry.path[len(key) + 1 :]]
    return "\n".join([*lines, *_listed(below)])


def _without_names(key: str, known: list[Key]) -> str:
    """Return the key without names that the user chose: modalities, conditions, keys of a run that a sweep sets."""
    if any(entry.path == key for entry in known):
        return key
    for entry in known:
        prefix = f"{entry.path}."
        if not key.startswith(prefix) or get_origin(entry.field.annotation) is not dict:
            continue
        rest = key.removeprefix(prefix)
        if entry.path in {"sweep.grid", "sweep.space"}:
            return rest
        below = rest.partition(".")[2]
        if entry.path == "sweep.conditions":
            return below or entry.path
        return f"{prefix}{below}" if below else entry.path
    return key


def _explained_step(keys: list[Key]) -> list[str]:
    lines = [f"  {entry.field.description}" for entry in keys if _last(entry) == "kind"]
    for entry in keys:
        if _last(entry) != "kind":
            lines += [f"  {_last(entry)}: {entry.field.description}", *_facts(entry.field)]
    return lines


def _siblings(key: str, known: list[Key]) -> list[str]:
    """Return the similar keys in the section of a key."""
    section, _, last = key.rpartition(".")
    parts = [entry.path.rpartition(".") for entry in known]
    return [f"{section}.{name}".lstrip(".") for name in likely_typos(last, [p[2] for p in parts if p[0] == section])]


def _by_meaning(entries: list[Key]) -> list[tuple[str, FieldInfo]]:
    """Return each distinct meaning of a key once, headed by the kinds of step that share it."""
    groups: dict[str, list[Key]] = {}
    for entry in entries:
        groups.setdefault(repr(entry.field), []).append(entry)
    return [
        (", ".join(entry.kind for entry in group if entry.kind) + ": " if group[0].kind else "", group[0].field)
        for group in groups.values()
    ]


def _listed(below: list[Key]) -> list[str]:
    """Return one line per key of a section, or per kind of step of a list."""
    meanings = {_last(entry): str(entry.field.description) for entry in below if entry.kind is None}
    for entry in below:
        if entry.kind and _last(entry) == "kind":
            keys = [_last(other) for other in below if other.kind == entry.kind and other is not entry]
            meanings[entry.kind] = f"{entry.field.description}" + (f" (keys: {', '.join(keys)})" if keys else "")
    if not meanings and below:
        meanings = {_last(entry): str(entry.field.description) for entry in below}
    width = max(map(len, meanings), default=0)
    title = "kinds:" if any(entry.kind and _last(entry) == "kind" for entry in below) else "keys:"
    rows = [f"    {name:<{width}}  {meaning}" for name, meaning in meanings.items()]
    return ["", f"  {title}", *rows] if rows else []


def _last(entry: Key) -> str:
    return entry.path.rsplit(".", 1)[-1]


def _facts(field: FieldInfo) -> list[str]:
    """Return a line each for type, unit, range, length and default, as far as the field has them."""
    extra = field.json_schema_extra
    facts = {
        "type": _words(field.annotation),
        "unit": str(extra.get("unit")) if isinstance(extra, dict) else "",
        "range": " and ".join(dict.fromkeys([*_limits(field.metadata), *_limits_in(field.annotation)])),
        "length": "".join(f"at least {m.min_length}" for m in field.metadata if type(m) is MinLen),
        "default": "none (required)" if field.is_required() else _plain(field.default),
    }
    return [f"    {name + ':':<9}{fact}" for name, fact in facts.items() if fact]


def _limits(metadata: list[Any]) -> list[str]:
    limits = [(*SIGNS[type(m)], m) for m in metadata if type(m) in SIGNS]
    return [f"{sign} {_plain(getattr(m, name))}" for sign, name, m in limits]


def _limits_in(annotation: Any) -> list[str]:
    """Return the limits of the elements of a list or of the alternative to none."""
    if models_in(annotation):
        return []
    is_field = get_origin(annotation) is Annotated and isinstance(annotation.__metadata__[0], FieldInfo)
    limits = _limits(annotation.__metadata__[0].metadata) if is_field else []
    return limits + [limit for argument in get_args(annotation)[:1] for limit in _limits_in(argument)]


def _words(annotation: Any) -> str:
    """Return the name of a type for users."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    models = models_in(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return " or ".join(str(value) for value in arguments) if len(arguments) > 1 else f"always {arguments[0]}"
    if origin is tuple:
        return "list of steps" if len(models) > 1 else f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_words(arguments[1])}"
    if models and NoneType not in arguments:
        return "section" if len(models) == 1 else "section with `kind`, or the kind alone"
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
    return {"None": "none", "{}": "empty"}.get(str(value), str(value))
