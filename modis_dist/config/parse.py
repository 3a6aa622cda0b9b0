"""From YAML and overrides to a frozen tree, with every mistake reported at once by the key the author typed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modis_dist.config import yaml12
from modis_dist.config.run import Run
from modis_dist.config.study import Study
from modis_dist.errors import ConfigError, nearest, shown

Tree = dict[str, Any]
AnyRun = TypeVar("AnyRun", bound=Run)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with ``key=value`` overrides applied. Raises ``ConfigError``."""
    tree = with_overrides(yaml12.read(path), overrides)
    return _absolute(build(Study, tree, source=str(path)), path.parent)


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run in a YAML file, with ``key=value`` overrides applied. Raises ``ConfigError``."""
    tree = with_overrides(yaml12.read(path), overrides)
    if "sweep" in tree:
        raise ConfigError(["sweep: this is a study; run it with `modis-dist tune`"], source=str(path))
    return _absolute(build(Run, tree, source=str(path)), path.parent)


def build(kind: type[AnyRun], tree: Tree, *, source: str) -> AnyRun:
    """Validate a tree; ``source`` names it in messages. Raises ``ConfigError`` with every mistake."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(kind, detail) for detail in error.errors()]
        raise ConfigError(list(dict.fromkeys(problems)), source=source) from None


def with_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """A copy of the tree with ``a.b=value`` settings written into it; values are YAML.

    Raises ``ConfigError`` for a setting without ``=``, an empty key, or one given twice.
    """
    settings: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        source = f"--set {shown(text)}"
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(["expected key=value"], source=source)
        if key in settings:
            raise ConfigError([f"{shown(key)} was already set"], source=source)
        settings[key] = yaml12.parse(value, source=source)
    return with_settings(tree, settings, source="--set")


def with_settings(tree: Tree, settings: Mapping[str, Any], *, source: str) -> Tree:
    """A copy of the tree with dotted keys written into it."""
    changed: Tree = json.loads(json.dumps(tree))
    for key, value in settings.items():
        *sections, last = key.split(".")
        here = changed
        for section in sections:
            inner = here.setdefault(section, {})
            if inner is None:
                inner = here[section] = {}
            if not isinstance(inner, dict):
                raise ConfigError([f"{shown(key)}: {shown(section)} is not a section"], source=source)
            here = inner
        here[last] = value
    return changed


def to_tree(run: BaseModel) -> Tree:
    """The whole tree with every default, as plain values."""
    tree: Tree = run.model_dump(mode="json")
    return tree


def dump(run: BaseModel) -> str:
    """YAML that builds the same run again."""
    return yaml12.dump(to_tree(run))


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _absolute(run: AnyRun, folder: Path) -> AnyRun:
    """Paths are meant relative to the YAML file; workers run elsewhere, so they are made absolute."""
    data: Tree = {}
    if run.data.store is not None:
        data["store"] = str((folder / Path(run.data.store).expanduser()).resolve())
    simulate = run.data.simulate
    if simulate is not None and simulate.params is not None:
        params = str((folder / Path(simulate.params).expanduser()).resolve())
        data["simulate"] = simulate.model_copy(update={"params": params})
    return run.model_copy(update={"data": run.data.model_copy(update=data)})


# --- messages -------------------------------------------------------------------------------------------------


def _problem(kind: type[BaseModel], detail: ErrorDetails) -> str:
    """One mistake as `key: what was expected (got ...)`."""
    location, section = _typed_location(kind, detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        last = str(detail["loc"][-1])
        known = sorted(section.model_fields) if section else []
        return f"{location}: unknown key{nearest(last, known) or '; known: ' + ', '.join(known)}"
    if detail["type"] == "missing":
        return f"{location}: is required"
    if detail["type"] == "union_tag_invalid":
        context = detail["ctx"]
        known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        hint = nearest(context["tag"], known) or "; known: " + ", ".join(known)
        return f"{location}: unknown kind {shown(context['tag'])!r}{hint}"
    if detail["type"] in {"value_error", "union_tag_not_found"}:
        return f"{location}: {message}" if location else message
    message = message[0].lower() + message[1:]
    return f"{location}: {message} (got {shown(detail['input'])})"


def _typed_location(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The key as its author typed it (pydantic puts union tags between), and the section that holds it."""
    parts: list[str] = []
    here: Any = kind
    section: type[BaseModel] | None = kind
    for part in loc:
        models = _models_in(here)
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [f"[{part}]"]
            continue
        chosen = [m for m in models if part in m.model_fields]
        tagged = [m for m in models if _tag(m) == part]
        if len(models) > 1 and tagged:
            here = section = tagged[0]
            continue
        parts.append(part)
        if models:
            section = models[0]
        here = chosen[0].model_fields[part].annotation if chosen else here
    return ".".join(shown(p) for p in parts), section


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return str(field.default) if field else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every section class that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


# --- explanations ---------------------------------------------------------------------------------------------


def explain(key: str, kind: type[BaseModel] = Study) -> str:
    """Meaning, type, unit, default and range of one dotted key. Raises ``ConfigError`` for an unknown key."""
    models: list[type[BaseModel]] = [kind]
    lines: list[str] = []
    for depth, part in enumerate(key.split(".")):
        holders = [m for m in models if part in m.model_fields]
        if not holders:
            known = sorted({name for m in models for name in m.model_fields})
            hint = nearest(part, known) or ("; known: " + ", ".join(known) if known else "")
            raise ConfigError([f"{shown(part)}: unknown key{hint}"], source=f"--explain {shown(key)}")
        lines = [_describe(".".join(key.split(".")[: depth + 1]), m.model_fields[part]) for m in holders]
        models = [found for m in holders for found in _models_in(m.model_fields[part].annotation)]
    below = sorted({name for m in models for name in m.model_fields})
    return "\n".join([*dict.fromkeys(lines), *(["keys: " + ", ".join(below)] if below else [])])


def _describe(key: str, field: Any) -> str:
    from annotated_types import Ge, Gt, Le, Lt

    signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    limits = [f"{signs[type(m)][0]} {getattr(m, signs[type(m)][1])}" for m in field.metadata if type(m) in signs]
    values = (
        [repr(v) for v in get_args(field.annotation)]
        if get_origin(field.annotation) is not None and "Literal" in str(get_origin(field.annotation))
        else []
    )
    unit = (field.json_schema_extra or {}).get("unit")
    default = "required" if field.is_required() else _plain(field.default)
    facts = [
        f"default: {default}",
        *([f"unit: {unit}"] if unit else []),
        *([f"range: {', '.join(limits)}"] if limits else []),
        *([f"one of: {', '.join(values)}"] if values else []),
    ]
    return f"{key}: {field.description}\n  " + "\n  ".join(facts)


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see the keys below"
    if isinstance(value, tuple):
        return (
            "["
            + ", ".join(_plain(v) if not isinstance(v, BaseModel) else str(getattr(v, "kind", v)) for v in value)
            + "]"
        )
    return "none" if value is None else str(value)
