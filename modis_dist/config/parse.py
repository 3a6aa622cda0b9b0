"""From YAML and overrides to a frozen tree, with every mistake reported at once by the key the author typed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from modis_dist.config import yaml12
from modis_dist.config.messages import mistakes
from modis_dist.config.run import SCHEDULES, Run
from modis_dist.config.study import Study
from modis_dist.runtime.errors import ConfigError, shown

Tree = dict[str, Any]
PATHS = ("data.store", "data.simulate.params")  # relative to the YAML file, or on the command line to where one is
DOTTED = (
    (("sweep", "grid"), 0),
    (("sweep", "space"), 0),
    (("sweep", "conditions"), 1),
)  # sections, and names below them, that hold dotted keys
AnyRun = TypeVar("AnyRun", bound=Run)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with ``key=value`` overrides applied.

    Raises ``ConfigError`` with every mistake, those of the keys and values that are swept included.
    """
    tree = _read(path, overrides)
    problems = [*_refused(Study, tree), *_mistakes_in_sweep(tree)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), source=str(path))
    return build(Study, tree, source=str(path))


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run in a YAML file, with ``key=value`` overrides applied. Raises ``ConfigError``."""
    tree = _read(path, overrides)
    if "sweep" in tree:
        raise ConfigError(["sweep: this is a study; run it with `modis-dist tune`"], source=str(path))
    return build(Run, tree, source=str(path))


def _read(path: Path, overrides: Sequence[str]) -> Tree:
    """What the file says, then what the overrides say; the paths of each are absolute."""
    tree = _absolute(yaml12.read(path), path.parent)
    return _absolute(with_overrides(tree, overrides), Path.cwd())


def _absolute(tree: Tree, folder: Path) -> Tree:
    """A copy with relative paths resolved against ``folder``: workers run elsewhere."""
    changed = tree
    for key in PATHS:
        *sections, last = key.split(".")
        here: Any = tree
        for section in sections:
            here = here.get(section) if isinstance(here, dict) else None
        given = here.get(last) if isinstance(here, dict) else None
        if isinstance(given, str) and given:
            changed = with_settings(changed, {key: _resolved(given, folder, key)}, source=key)
    return changed


def _resolved(path: str, folder: Path, key: str) -> str:
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except RuntimeError as error:  # no such user after `~`, or links that lead to each other
        raise ConfigError([f"{key}: {shown(path)} leads nowhere ({shown(str(error))})"], source=key) from None


def build(kind: type[AnyRun], tree: Tree, *, source: str) -> AnyRun:
    """Validate a tree; ``source`` names it in messages. Raises ``ConfigError`` with every mistake."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(mistakes(kind, error), source=source) from None


def _refused(kind: type[BaseModel], tree: Tree) -> list[str]:
    """Every mistake in a tree."""
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        return mistakes(kind, error)
    return []


def _mistakes_in_sweep(tree: Tree) -> list[str]:
    """What a run would refuse of each condition, and of each value of the grid or end of a range, by itself."""
    sweep = tree.get("sweep")
    if not isinstance(sweep, dict):
        return []
    base = {key: value for key, value in tree.items() if key != "sweep"}
    swept = [(f"sweep.conditions.{shown(name)}", given) for name, given in _items(sweep.get("conditions"))]
    for key, values in _items(sweep.get("grid")):
        swept += [("sweep.grid", {key: value}) for value in (values if isinstance(values, list) else [])]
    for key, dimension in _items(sweep.get("space")):
        ends = dict(_items(dimension))
        choices = ends.get("choices")
        values = [
            *(choices if isinstance(choices, list) else []),
            *(ends[e] for e in ("low", "high") if ends.get(e) is not None),
        ]
        swept += [("sweep.space", {key: value}) for value in values]
    known = _refused(Run, base)
    problems: list[str] = []
    for place, settings in swept:
        try:
            run = with_settings(base, dict(_items(settings)), source="sweep")
            found = [problem for problem in _refused(Run, run) if problem not in known]
        except ConfigError as error:
            found = error.problems
        problems += [f"{place}: {problem}" for problem in found]
    return problems


def _items(section: Any) -> list[tuple[str, Any]]:
    return list(section.items()) if isinstance(section, dict) else []


def with_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """A copy of the tree with ``a.b=value`` settings written into it; values are YAML.

    Raises ``ConfigError`` for a setting without ``=`` or value, an empty key, or one given twice.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for text in overrides:
        key, _, value = (part.strip() for part in text.partition("="))
        if not all(key.split(".")) or not value:
            problems.append(f"{shown(text)}: expected key=value")
        elif key in settings:
            problems.append(f"{shown(text)}: {shown(key)} was already set")
        else:
            settings[key] = yaml12.parse(value, source=f"--set {shown(text)}")
    if problems:
        raise ConfigError(problems, source="--set")
    return with_settings(tree, settings, source="--set")


def with_settings(tree: Tree, settings: Mapping[str, Any], *, source: str) -> Tree:
    """A copy of the tree with dotted keys written into it; a schedule first, for it stands for several."""
    changed: Tree = json.loads(json.dumps(tree))
    schedule = settings.get("optim.schedule")
    if isinstance(schedule, str):
        settings = {**SCHEDULES.get(schedule, {}), **settings}
    for key, value in settings.items():
        *sections, last = _parts(key)
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


def _parts(key: str) -> list[str]:
    """The parts of a dotted key; what stands below the grid or a condition is itself a dotted key of the run."""
    parts = key.split(".")
    named = next((len(place) + below for place, below in DOTTED if tuple(parts[: len(place)]) == place), len(parts))
    return [*parts[:named], ".".join(parts[named:])] if named < len(parts) else parts


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
