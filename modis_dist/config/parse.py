"""Parse YAML and overrides into a frozen tree; report all mistakes at once, by the key that the user typed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from modis_dist.config import yaml12
from modis_dist.config.messages import mistakes
from modis_dist.config.run import PRESETS, Run
from modis_dist.config.study import Study
from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.text import shown

Tree = dict[str, Any]
# Relative to the YAML file; in an override, to the working directory.
PATHS = ("data.store", "data.simulate.reference")
# Sections whose keys are dotted keys of the run, and the number of user-chosen names in between.
DOTTED = ((("sweep", "grid"), 0), (("sweep", "space"), 0), (("sweep", "conditions"), 1))
AnyRun = TypeVar("AnyRun", bound=Run)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Load a study from a YAML file and apply ``key=value`` overrides.

    Raises ``ConfigError`` with every mistake, including those in swept keys and values.
    """
    tree = _read(path, overrides)
    problems = [*_mistakes_in(Study, tree), *_mistakes_in_sweep(tree)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), source=str(path))
    return build(Study, tree, source=str(path))


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Load a run from a YAML file and apply ``key=value`` overrides. Raises ``ConfigError``."""
    tree = _read(path, overrides)
    if "sweep" in tree:
        raise ConfigError(["sweep: this is a study; run it with `modis-dist tune`"], source=str(path))
    return build(Run, tree, source=str(path))


def _read(path: Path, overrides: Sequence[str]) -> Tree:
    """Return the tree of a file with overrides applied and paths made absolute."""
    tree = _absolute(yaml12.read(path), path.parent)
    return _absolute(with_overrides(tree, overrides), Path.cwd())


def _absolute(tree: Tree, folder: Path) -> Tree:
    """Return a copy with relative paths resolved against ``folder``; workers have other working directories."""
    changed = tree
    for key in PATHS:
        *sections, last = key.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        given = node.get(last) if isinstance(node, dict) else None
        if isinstance(given, str) and given:
            changed = with_settings(changed, {key: _resolved(given, folder, key)}, source=key)
    return changed


def _resolved(path: str, folder: Path, key: str) -> str:
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except RuntimeError as error:  # no such user after `~`, or links that lead to each other
        raise ConfigError([f"{key}: cannot resolve {shown(path)} ({shown(str(error))})"], source=key) from None


def build(kind: type[AnyRun], tree: Tree, *, source: str) -> AnyRun:
    """Validate a tree, which messages call ``source``. Raises ``ConfigError`` with every mistake."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(mistakes(kind, error), source=source) from None


def _mistakes_in(kind: type[BaseModel], tree: Tree) -> list[str]:
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        return mistakes(kind, error)
    return []


def _mistakes_in_sweep(tree: Tree) -> list[str]:
    """Return the mistakes of each condition, each grid value and each bound or choice of the search space."""
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
    known = _mistakes_in(Run, base)
    problems: list[str] = []
    for key, settings in swept:
        try:
            run = with_settings(base, dict(_items(settings)), source="sweep")
            new = [problem for problem in _mistakes_in(Run, run) if problem not in known]
        except ConfigError as error:
            new = error.problems
        problems += [f"{key}: {problem}" for problem in new]
    return problems


def _items(section: Any) -> list[tuple[str, Any]]:
    return list(section.items()) if isinstance(section, dict) else []


def with_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return a copy of the tree with ``a.b=value`` overrides applied; values are YAML.

    Raises ``ConfigError`` for an override without ``=`` or value, an empty key, or a key that is set twice.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for text in overrides:
        key, _, value = (part.strip() for part in text.partition("="))
        if not all(key.split(".")) or not value:
            problems.append(f"{shown(text)}: expected key=value")
        elif key in settings:
            problems.append(f"{shown(text)}: {shown(key)} is set twice")
        else:
            settings[key] = yaml12.parse(value, source=f"--set {shown(text)}")
    if problems:
        raise ConfigError(problems, source="--set")
    return with_settings(tree, settings, source="--set")


def with_settings(tree: Tree, settings: Mapping[str, Any], *, source: str) -> Tree:
    """Return a copy of the tree with dotted keys set; the keys of a preset are set first."""
    changed: Tree = json.loads(json.dumps(tree))
    preset = settings.get("optim.preset")
    if isinstance(preset, str):
        settings = {**PRESETS.get(preset, {}), **settings}
    for key, value in settings.items():
        *sections, last = _parts(key)
        node = changed
        for section in sections:
            child = node.setdefault(section, {})
            if child is None:
                child = node[section] = {}
            if not isinstance(child, dict):
                raise ConfigError([f"{shown(key)}: {shown(section)} is not a section"], source=source)
            node = child
        node[last] = value
    return changed


def _parts(key: str) -> list[str]:
    """Split a dotted key; below the grid, the space or a condition, a dotted key of the run is a single part."""
    parts = key.split(".")
    depth = next((len(path) + names for path, names in DOTTED if tuple(parts[: len(path)]) == path), len(parts))
    return [*parts[:depth], ".".join(parts[depth:])] if depth < len(parts) else parts


def to_tree(run: BaseModel) -> Tree:
    """Return the tree with every default, as plain values."""
    tree: Tree = run.model_dump(mode="json")
    return tree


def dump(run: BaseModel) -> str:
    """Return YAML that builds an equal run."""
    return yaml12.dump(to_tree(run))


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
