"""Error messages for an invalid tree: one per mistake, by the key that the user typed, free of pydantic terms."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modis_dist.config.keys import kind_of, likely_typos, models_in, other_section_hint
from modis_dist.config.run import DEVICE, NAME
from modis_dist.runtime.errors import nearest
from modis_dist.runtime.text import shown

EXPECTED = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "is too large for an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a kind, or a section with `kind`",
    NAME: "must be 1 to 64 letters, digits, dots, hyphens or underscores, starting with a letter or digit",
    DEVICE: "must be auto, cpu, cuda or cuda:N",
}


def mistakes(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """Return every mistake once, as `key: expectation (got ...)`, in the order of the keys."""
    return list(dict.fromkeys(_problem(kind, detail) for detail in _causes(error.errors())))


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drop errors that only follow from others: a list with invalid elements is not reported as too short."""
    inside = {detail["loc"][:-1] for detail in details}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in inside]


def _problem(kind: type[BaseModel], detail: ErrorDetails) -> str:
    """Return one mistake as `key: expectation (got ...)`."""
    location, section = _typed_location(kind, detail["loc"])
    wrong, context = detail["type"], detail.get("ctx", {})
    if wrong == "extra_forbidden":
        return f"{location}: unknown key{_known_key(kind, section, location, str(detail['loc'][-1]))}"
    if wrong == "missing":
        return f"{location}: required"
    if wrong in {"union_tag_invalid", "union_tag_not_found"}:
        return f"{location}: {_wrong_kind(detail)}"
    if wrong == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{location}: {message}" if location else message
    expected = _expected(wrong, context) or detail["msg"][0].lower() + detail["msg"][1:]
    return f"{location}: {expected} (got {_given(detail['input'])}){_hint(wrong, detail['input'], context)}"


def _known_key(kind: type[BaseModel], section: type[BaseModel] | None, location: str, last: str) -> str:
    """Return a hint: a similar key of the section, the same key of another section, or the keys of the section."""
    known = sorted(section.model_fields) if section else []
    return (
        nearest(last, likely_typos(last, known))
        or other_section_hint(location, kind)
        or nearest(last, known)
        or "; known: " + ", ".join(known)
    )


def _wrong_kind(detail: ErrorDetails) -> str:
    if "ctx" not in detail or "expected_tags" not in detail["ctx"]:
        return f"must be a kind, or a section with `kind` (got {_given(detail['input'])})"
    known = [tag.strip("' ") for tag in detail["ctx"]["expected_tags"].split(",")]
    given = str(detail["ctx"]["tag"])
    return f"unknown kind '{shown(given)}'{nearest(given, known) or '; known: ' + ', '.join(known)}"


def _expected(wrong: str, context: Mapping[str, Any]) -> str | None:
    """Return the expectation that a value fails, or None for error types without a text of our own."""
    signs = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge")}
    signs |= {"less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}
    if wrong in signs:
        sign, limit = signs[wrong]
        return f"must be {sign} {context[limit]:g}" if abs(context[limit]) < 1e6 else f"must be {sign} {context[limit]}"
    if wrong == "literal_error":
        return f"must be {context['expected']}"
    if wrong == "too_short":
        return f"must have at least {context['min_length']} element(s)"
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
    """Return a value as written in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _typed_location(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """Return the key as the user typed it (pydantic inserts union tags) and the section that contains it."""
    parts: list[str] = []
    annotation: Any = kind
    section: type[BaseModel] | None = kind
    for part in loc:
        if part == "[key]":
            continue
        models = models_in(annotation)
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [f"[{part}]"]
            continue
        chosen = [m for m in models if part in m.model_fields]
        tagged = [m for m in models if kind_of(m) == part]
        if len(models) > 1 and tagged:
            annotation = section = tagged[0]
            continue
        parts.append(part)
        if models:
            section = models[0]
        annotation = chosen[0].model_fields[part].annotation if chosen else annotation
    return ".".join(shown(p) for p in parts), section
