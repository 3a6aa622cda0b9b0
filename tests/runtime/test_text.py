"""Escaping and shortening of text for display."""

import pytest

from modis_dist.runtime.text import markdown, plain, shown


def test_messages_escape_everything_but_printable_ascii() -> None:
    assert shown("caf\xe9\n\x1b[0m\u202e") == r"caf\xe9\n\x1b[0m\u202e"
    assert shown(3) == "3"


def test_names_keep_letters_of_every_alphabet() -> None:
    assert plain("m\xe9thyl\x1b[0m\u202e") == "m\xe9thyl" + r"\x1b[0m\u202e"


@pytest.mark.parametrize("limit", [20, 21])
def test_long_names_are_cut_in_the_middle(limit: int) -> None:
    text = plain("a" * 50 + "b" * 50, limit=limit)
    assert len(text) == limit and text.startswith("aaa") and text.endswith("bbb") and "..." in text


def test_markdown_shows_names_as_written() -> None:
    assert markdown("<b>|*x*_&") == r"&lt;b&gt;\|\*x\*\_&amp;"
