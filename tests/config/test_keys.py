"""Every key of the JSON Schema: misspelt, of the wrong type, out of range, explained."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modis_dist.cli.main import run
from modis_dist.config import parse
from modis_dist.config.keys import every_key
from modis_dist.config.study import Study
from modis_dist.runtime.errors import ConfigError

SCHEMA = Study.model_json_schema()
FREE = "NAME"  # stands for a name that the user chooses


@dataclass(frozen=True)
class KeyCase:
    """A key of the JSON Schema: its path, the smallest tree that contains it, its rule."""

    path: tuple[str | int, ...]  # as typed in the YAML, list positions included
    around: dict[int, dict[str, Any]]  # other keys that the section at each depth of the path needs
    rule: dict[str, Any]

    @property
    def shown(self) -> str:
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")

    @property
    def dotted(self) -> str:
        """Path without positions and free names, as for `--explain`."""
        return ".".join(part for part in self.path if isinstance(part, str) and part != FREE)

    def tree(self, value: Any, *, key: str | None = None) -> dict[str, Any]:
        """Return a study in which this key (or a misspelt one) has a value."""
        node = value
        for depth, part in reversed(list(enumerate(self.path))):
            name = key if key and depth == len(self.path) - 1 else part
            node = [node] if isinstance(part, int) else {**self.around.get(depth, {}), name: node}
        tree: dict[str, Any] = node
        return tree


def resolved(rule: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in rule:
        rule = {**SCHEMA["$defs"][rule["$ref"].rsplit("/", 1)[-1]], **{k: v for k, v in rule.items() if k != "$ref"}}
    return rule


def alternatives(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the alternatives of a rule, without null."""
    rule = resolved(rule)
    options = rule.get("anyOf") or rule.get("oneOf")
    inner_rules = [inner for option in options for inner in alternatives(option)] if options else [rule]
    return [option for option in inner_rules if option.get("type") != "null"]


NEEDED = {
    "HideLabels": {"keep": 1},
    "Subsample": {"rows": 1},
    "CutClass": {"label": "a", "rows": 1},
    "KeepPairs": {"pairs": [{"label": "a", "modality": "m"}], "rows": 1},
    "DropPairs": {"pairs": [{"label": "a", "modality": "m"}]},
    "Variance": {"features": 1},
    "Pca": {"components": 1},
    "Dimension": {"choices": [1]},
    "Pair": {"label": "a", "modality": "m"},
}

BESIDE = {"search": {"space": {"optim.lr": {"choices": [1]}}}, "space": {"search": "random"}}  # accepted only together


def places(
    rule: dict[str, Any], path: tuple[str | int, ...] = (), around: dict[int, dict[str, Any]] | None = None
) -> Iterator[KeyCase]:
    around = around or {}
    for option in alternatives(rule):
        if option.get("type") == "array":
            yield from (p for inner in alternatives(option["items"]) for p in places(inner, (*path, 0), around))
        named = option["additionalProperties"] if isinstance(option.get("additionalProperties"), dict) else {}
        for inner in [*option.get("patternProperties", {}).values(), *([named] if "$ref" in named else [])]:
            yield from places(inner, (*path, FREE), around)
        for name, inner in option.get("properties", {}).items():
            needed = NEEDED.get(str(option.get("title")), {})
            if "kind" in option["properties"] and path and (isinstance(path[-1], int) or path[-1] == "search"):
                needed = {"kind": option["properties"]["kind"]["const"], **needed}
            node = {**around, len(path): {k: v for k, v in needed.items() if k != name} | BESIDE.get(name, {})}
            yield KeyCase((*path, name), node, inner)
            yield from places(inner, (*path, name), node)


PLACES = list(places(SCHEMA))
DOTTED = sorted({place.dotted for place in PLACES})


def problems(tree: dict[str, Any]) -> list[str]:
    try:
        parse.build(Study, tree, source="s.yaml")
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("s.yaml: ")
        return error.problems
    return []


def test_the_test_cases_cover_every_key() -> None:
    assert {key.path for key in every_key()} == set(DOTTED)
    assert len(DOTTED) > 90


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.shown)
def test_a_misspelt_key_is_refused_with_the_right_one(place: KeyCase) -> None:
    name = str(place.path[-1])
    if name == "kind" and (isinstance(place.path[-2], int) or place.path[-2] == "search"):
        (problem,) = problems(place.tree(1, key="knid"))
        assert problem.startswith(f"{place.shown[:-5]}: ") and "`kind`" in problem
        return
    wrong = name[:-1] + name[-1] * 2 + "x"  # a slip at the end
    location = place.shown[: -len(name)] + wrong
    matching = [problem for problem in problems(place.tree(1, key=wrong)) if problem.startswith(f"{location}: ")]
    assert len(matching) == 1 and "unknown key; did you mean" in matching[0]
    assert f"'{name}'" in matching[0]


@pytest.mark.parametrize(("key", "meant"), [("lr", "optim.lr"), ("epochs", "optim.epochs"), ("beta", "objective.beta")])
def test_a_key_in_the_wrong_section_is_refused_with_the_right_section(key: str, meant: str) -> None:
    assert problems({key: 1}) == [f"{key}: unknown key; did you mean '{meant}'?"]


WRONG: dict[str, list[Any]] = {
    "integer": ["many", 1.5, True, [], {}, float("nan")],
    "number": ["much", True, [], {}, float("nan"), float("inf")],
    "boolean": ["maybe", 3, [], {}, 0.5],
    "string": [1, 2.5, True, [], {}],
    "array": ["one", 3, True, {"x": 1}],
    "object": [1, 2.5, True, [1]],
}


def wrong_values(rule: dict[str, Any]) -> list[Any]:
    """Return values of the types that no alternative of a rule accepts."""
    kinds = {str(option.get("type", "any")) for option in alternatives(rule)}
    if "any" in kinds or len(kinds) > 1:
        return []
    (kind,) = kinds
    nullable = any(option.get("type") == "null" for option in resolved(rule).get("anyOf", []))
    return WRONG[kind] + ([] if nullable else [None])


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.shown)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(place: KeyCase) -> None:
    for value in wrong_values(place.rule):
        reported = problems(place.tree(value))
        section = place.shown.rsplit(".", 1)[0] if place.path[-1] == "kind" else place.shown
        assert any(problem.startswith(section) for problem in reported), (value, reported)


def limits(rule: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield a value just inside and a value just outside each limit of a number."""
    for option in alternatives(rule):
        step = 1 if option.get("type") == "integer" else 1e-9
        for name, inward, strict in (
            ("minimum", 1, False),
            ("maximum", -1, False),
            ("exclusiveMinimum", 1, True),
            ("exclusiveMaximum", -1, True),
        ):
            if name in option and option.get("type") in {"integer", "number"}:
                limit = option[name] if option["type"] == "number" else int(option[name])
                inside, outside = (limit + inward * step, limit) if strict else (limit, limit - inward * step)
                yield inside, outside if abs(limit) < 1e6 or isinstance(limit, int) else limit * (1 + 1e-9)


LIMITED = [(place, inside, outside) for place in PLACES for inside, outside in limits(place.rule)]


def test_most_numbers_have_limits() -> None:
    numbers = [p for p in PLACES if any(o.get("type") in {"integer", "number"} for o in alternatives(p.rule))]
    assert len({p.shown for p in numbers}) > 40
    ends = {f"sweep.space.{FREE}.low", f"sweep.space.{FREE}.high"}  # have the limits of the key that is searched
    assert {p.shown for p in numbers} - ends == {place.shown for place, _, _ in LIMITED}, "a number without a limit"


PARTNERS = {  # accepted only together
    "data.split.folds": {"fold": 0},
    "data.split.fold": {"folds": 100},
    f"sweep.space.{FREE}.step": {"low": 0, "high": 1},
}
INSTEAD = {"scenario[0].fraction": {"keep", "rows"}, f"sweep.space.{FREE}.step": {"choices"}}  # refused together


@pytest.mark.parametrize(("place", "inside", "outside"), LIMITED, ids=lambda value: getattr(value, "shown", str(value)))
def test_a_limit_admits_the_value_inside_and_refuses_the_one_outside_with_key_and_range(
    place: KeyCase, inside: Any, outside: Any
) -> None:
    partners = PARTNERS.get(place.shown, {})
    depth = len(place.path) - 1
    needed = {k: v for k, v in place.around[depth].items() if k not in INSTEAD.get(place.shown, ())}
    at = KeyCase(place.path, {**place.around, depth: needed | partners}, place.rule)
    assert problems(at.tree(inside)) == []
    (problem,) = problems(at.tree(outside))
    assert problem.startswith(f"{place.shown}: must be ")
    assert any(sign in problem for sign in ("must be >", "must be <"))


# --- explanations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", DOTTED)
def test_every_key_is_explained_with_meaning_default_unit_and_range(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "--explain", key]) == 0
    text = capsys.readouterr().out
    assert text.startswith(key + "\n")
    for place in (p for p in PLACES if p.dotted == key):
        rule = place.rule
        assert str(rule.get("description")) in text
        if "unit" in rule:
            assert f"unit:    {rule['unit']}" in text
        if not isinstance(place.path[-2] if len(place.path) > 1 else None, int) and "default" not in rule:
            assert "default:" in text
        if list(limits(rule)):
            assert "range:   " in text
    assert "PydanticUndefined" not in text and "typing" not in text and "None" not in text


def test_a_key_of_several_kinds_of_step_is_explained_per_kind(capsys: pytest.CaptureFixture[str]) -> None:
    run(["config", "--explain", "scenario.fraction"])
    text = capsys.readouterr().out
    assert "  hide_labels: " in text
    assert "  subsample: " in text
    assert "cut_class" not in text


def test_a_list_of_steps_names_every_kind_and_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    run(["config", "--explain", "scenario"])
    text = capsys.readouterr().out
    assert "cut_class " in text and "(keys: label, rows, seed)" in text


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lr", "did you mean 'optim.lr'?"),
        ("optim.leaning_rate", "unknown key"),
        ("objective.penalty_wieght", "did you mean 'objective.penalty_weight'?"),
        ("scenarios", "did you mean 'scenario'?"),
        ("", "known: name, data"),
        ("optim.", "did you mean 'optim'?"),
    ],
)
def test_explaining_an_unknown_key_suggests_the_right_one(
    key: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "--explain", key]) == 2
    captured = capsys.readouterr()
    assert hint in captured.err and captured.err.count("\n") == 1 and not captured.out


# --- the JSON schema ------------------------------------------------------------------------------------------


def test_the_printed_schema_is_a_json_schema_that_shipped_studies_satisfy(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert run(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    root = Path(__file__).resolve().parents[2]
    studies = sorted((root / "tune_spaces").rglob("*.yaml"))
    assert studies
    for study in studies:
        assert [error.message for error in validator.iter_errors(parse.yaml12.read(study))] == []
    assert [error.message for error in validator.iter_errors({"optim": {"lrr": 1}})]
    assert not list(validator.iter_errors({"preprocess": {"default": ["minmax"]}, "scenario": ["unpair"]}))


def test_a_similar_key_of_the_same_section_is_suggested_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems({"sweep": {"fold": 3}}) == ["sweep.fold: unknown key; did you mean 'folds'?"]
    assert run(["config", "--explain", "sweep.fold"]) == 2
    assert "did you mean 'sweep.folds'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("scenario.hide_labels", ["hide labels", "  fraction: ", "  keep: ", ">= 0"]),
        (
            "preprocess.default.pca",
            ["principal components", "  components: number", "(required)"],
        ),
        ("preprocess.modalities.mirna.pca", ["preprocess.modalities.pca", "principal components"]),
        ("model.modalities.mirna.features", ["model.modalities.features", "unit:    features"]),
        ("sweep.conditions.few.optim.lr", ["optim.lr", "learning rate of the VAEs"]),
        ("sweep.grid.objective.beta", ["objective.beta", "weight of the KL divergence"]),
    ],
)
def test_kinds_of_steps_and_names_of_the_user_are_explained(
    key: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "--explain", key]) == 0
    stdout = capsys.readouterr().out
    assert all(text in stdout for text in expected), stdout


def test_explain_says_what_none_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--explain", "preprocess.default"]) == 0
    assert "none: no steps" in capsys.readouterr().out
