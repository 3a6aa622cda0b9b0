"""Strict YAML: rejected constructs, values of scalars, and round trips."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modis_dist.config import yaml12
from modis_dist.runtime.errors import ConfigError


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        yaml12.parse(text, source="s.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # text in YAML 1.1
        ("1E5", 1e5),
        ("010", 10),  # 8 in YAML 1.1
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("NO", "NO"),  # false in YAML 1.1
        ("yes", "yes"),
        ("on", "on"),
        ("1:30:00", "1:30:00"),  # 5400 in YAML 1.1
        ("2024-01-31", "2024-01-31"),  # a date in YAML 1.1
        ("1_000", "1_000"),  # 1000 in YAML 1.1
        ("nULL", "nULL"),
        ("null", None),
        ("~", None),
        ("", None),
        ("True", True),
        ("-.5", -0.5),
        (".inf", float("inf")),
        ("+7", 7),
        ("<<", "<<"),
        ("=", "="),
    ],
)
def test_scalars_are_resolved_as_in_yaml_1_2(text: str, value: Any) -> None:
    parsed = yaml12.parse(f"key: {text}", source="s.yaml")["key"]
    assert parsed == value and type(parsed) is type(value)


def test_a_merge_key_is_an_ordinary_key() -> None:
    assert yaml12.parse("<<: {a: 1}\nb: 2", source="s.yaml") == {"<<": {"a": 1}, "b": 2}


def test_a_duplicate_key_is_refused_with_both_lines() -> None:
    message = refusal("optim:\n  lr: 1\n  epochs: 3\n  lr: 2\n")
    assert re.search(r"line 4: duplicate key 'lr' .*\bline 2\b", message)
    assert "duplicate key" in refusal("a: 1\n'a': 2\n")


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/new:os.system [touch canary]",
        "!!binary aGVsbG8=",
        "!mine 3",
        "!!set {a, b}",
        "!!str 3",
        "!!timestamp 2024-01-01",
    ],
)
def test_a_tag_is_refused_with_its_line_and_not_executed(
    payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "line 2: tag " in refusal(f"a: 1\nb: {payload}")
    assert not list(tmp_path.iterdir())


def test_anchors_and_alias_bombs_are_refused() -> None:
    assert "line 1: anchors" in refusal("a: &x 1\nb: *x")
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert "anchors" in refusal(bomb)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_five_thousand_levels_are_refused_within_a_second(opening: str) -> None:
    started = time.process_time()
    assert "50 levels" in refusal(opening * 5000)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\0", "NUL"),
        ('a: "\\0"', "line 1: "),
        ('a: "\\ud800"', "line 1: "),
        ('"\\0": 1', "line 1: "),
        ("a:\n\tb: 1", "line 2: not valid YAML"),
        ("a: 1\x07", "not valid YAML"),
        ("a: [1", "line 1: not valid YAML"),
        ('{"a": 1,, }', "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("? [a]\n: 1", "line 1: "),
        ("? {a: 1}\n: 1", "line 1: "),
        ("a: " + "1" * 5000, "not valid YAML"),
        ("a: 1: 2", "line 1: not valid YAML"),
    ],
)
def test_text_that_is_not_plain_yaml_is_refused(text: str, reason: str) -> None:
    assert reason in refusal(text)


def test_a_byte_order_mark_and_carriage_returns_are_harmless(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes("\ufeffname: x\r\noptim:\r\n  lr: 1e-3\r\n".encode())
    assert yaml12.read(file) == {"name": "x", "optim": {"lr": 0.001}}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.exists, "no such file"),
        (Path.mkdir, "file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("# only a comment\n"), "empty"),
        (lambda path: path.write_text("- 1\n- 2\n"), "a list; "),
        (lambda path: path.write_text("just words"), "a str; "),
        (lambda path: path.write_bytes(b"name: caf\xe9"), "at byte 9"),
        (lambda path: path.write_bytes("name: x".encode("utf-16")), "at byte 0"),
        (lambda path: path.write_bytes(b"#" * 1_000_001), "1000000 bytes"),
    ],
)
def test_a_file_without_a_mapping_is_refused_by_its_path(tmp_path: Path, make: Any, reason: str) -> None:
    file = tmp_path / "s.yaml"
    make(file)
    with pytest.raises(ConfigError, match=r"s\.yaml: ") as caught:
        yaml12.read(file)
    assert reason in str(caught.value)


def test_a_file_of_a_gigabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    with file.open("wb") as stream:
        stream.truncate(2**30)
    started = time.process_time()
    with pytest.raises(ConfigError, match="1000000 bytes"):
        yaml12.read(file)
    assert time.process_time() - started < 0.5


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30)
tricky = st.sampled_from(
    ["NO", "1e-3", "010", "null", "~", "", " x ", "a: b", "# c", "- d", "'", '"', "\t", "x\n", ":"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | tricky
trees = st.dictionaries(
    text | tricky,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text | tricky, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)


@given(trees)
@settings(max_examples=100, deadline=None)
def test_a_dumped_tree_is_parsed_to_the_same_tree(tree: dict[str, Any]) -> None:
    assert yaml12.parse(yaml12.dump(tree), source="dump") == tree


def test_a_list_that_occurs_twice_is_written_twice() -> None:
    shared = [1, 2]
    assert yaml12.parse(yaml12.dump({"a": shared, "b": shared}), source="dump") == {"a": [1, 2], "b": [1, 2]}
