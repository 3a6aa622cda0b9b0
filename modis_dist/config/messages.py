"""What a refused tree is told: each mistake by the key its author typed, in words that need no pydantic."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modis_dist.config.keys import alike, elsewhere, kind_of, models_in
from modis_dist.config.run import DEVICE, NAME
from modis_dist.runtime.errors import nearest, shown

EXPECTED = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a name, or a section with `kind`",
    NAME: "must be 1 to 64 letters, digits, dots, hyphens or underscores, the first a letter or digit",
    DEVICE: "must be auto, cpu, cuda or cuda:N",
}


def mistakes(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """Every mistake once, as `key: what was expected (got ...)`, in the order of the keys."""
    return list(dict.fromkeys(_problem(kind, detail) for detail in _causes(error.errors())))


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows: a list of wrong values is not also too short."""
    inside = {detail["loc"][:-1] for detail in details}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in inside]


def _problem(kind: type[BaseModel], detail: ErrorDetails) -> str:
    """One mistake as `key: what was expected (got ...)`."""
    location, section = _typed_location(kind, detail["loc"])
    wrong, context = detail["type"], detail.get("ctx", {})
    if wrong == "extra_forbidden":
        return f"{location}: unknown key{_known_key(kind, section, location, str(detail['loc'][-1]))}"
    if wrong == "missing":
        return f"{location}: is required"
    if wrong in {"union_tag_invalid", "union_tag_not_found"}:
        return f"{location}: {_wrong_kind(detail)}"
    if wrong == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{location}: {message}" if location else message
    expected = _expected(wrong, context) or detail["msg"][0].lower() + detail["msg"][1:]
    return f"{location}: {expected} (got {_given(detail['input'])}){_hint(wrong, detail['input'], context)}"


def _known_key(kind: type[BaseModel], section: type[BaseModel] | None, location: str, last: str) -> str:
    """The key that was meant: the nearest neighbour, one that stands elsewhere, or the list of what may stand here."""
    known = sorted(section.model_fields) if section else []
    return (
        nearest(last, alike(last, known))
        or elsewhere(location, kind)
        or nearest(last, known)
        or "; known: " + ", ".join(known)
    )


def _wrong_kind(detail: ErrorDetails) -> str:
    if "ctx" not in detail or "expected_tags" not in detail["ctx"]:
        return f"must be a name, or a section with `kind` (got {_given(detail['input'])})"
    known = [tag.strip("' ") for tag in detail["ctx"]["expected_tags"].split(",")]
    given = str(detail["ctx"]["tag"])
    return f"unknown kind '{shown(given)}'{nearest(given, known) or '; known: ' + ', '.join(known)}"


def _expected(wrong: str, context: Mapping[str, Any]) -> str | None:
    """What a mistake's author should have written; pydantic's words where these have none."""
    signs = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge")}
    signs |= {"less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}
    if wrong in signs:
        sign, limit = signs[wrong]
        return f"must be {sign} {context[limit]:g}" if abs(context[limit]) < 1e6 else f"must be {sign} {context[limit]}"
    if wrong == "literal_error":
        return f"must be {context['expected']}"
    if wrong == "too_short":
        return f"needs at least {context['min_length']} value(s)"
    return EXPECTED.get(context["pattern"] if wrong == "string_pattern_mismatch" else wrong)


def _hint(wrong: str, given: Any, context: Mapping[str, Any]) -> str:
    if wrong == "literal_error" and isinstance(given, str):
        return nearest(given, re.findall(r"'([^']*)'", context["expected"]))
    if wrong == "string_type" and isinstance(given, int | float):
        return f"; write '{given}' in quotes"
    if wrong == "tuple_type" and isinstance(given, str | int | float):
        return f"; write [{shown(given)}]"
    return ""


def _given(value: Any) -> str:
    """A value as YAML would show it."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _typed_location(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The key as its author typed it (pydantic puts union tags between), and the section that holds it."""
    parts: list[str] = []
    here: Any = kind
    section: type[BaseModel] | None = kind
    for part in loc:
        if part == "[key]":
            continue
        models = models_in(here)
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [f"[{part}]"]
            continue
        chosen = [m for m in models if part in m.model_fields]
        tagged = [m for m in models if kind_of(m) == part]
        if len(models) > 1 and tagged:
            here = section = tagged[0]
            continue
        parts.append(part)
        if models:
            section = models[0]
        here = chosen[0].model_fields[part].annotation if chosen else here
    return ".".join(shown(p) for p in parts), section
