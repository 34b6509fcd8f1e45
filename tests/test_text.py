"""Names from a model are safe to show: no control character, no line of a megabyte."""

import pytest

from xform.errors import ModelError
from xform.text import escaped, paragraph, shown


@pytest.mark.parametrize("hostile", ["\x1b[31m", "\x07", "a\nb", "\r", "\x9b", "\u202e", "\u2028", "\x00", "\ud800"])
def test_no_character_that_a_terminal_obeys_is_shown(hostile: str) -> None:
    for text in (shown(hostile), escaped(hostile), str(ModelError("bad name", where=hostile, hint="rename it"))):
        assert not any(c in text for c in hostile if c not in "a[31mb\n"), text
        assert "\\" in text
    assert "\n" not in shown(hostile)


def test_plain_names_stay() -> None:
    for name in ("layers.0/MatMul_1", "größe", "層/正規化", "a b"):
        assert shown(name) == name


def test_long_names_are_shown_by_their_ends() -> None:
    text = shown("a" * 10_000_000 + "the end")
    assert len(text) < 200 and text.endswith("the end") and "more characters" in text
    assert len(paragraph("x" * 10_000_000)) < 2200


def test_paragraphs_keep_their_lines() -> None:
    assert paragraph("one\n\ttwo\x1b[0m") == "one\n\ttwo\\x1b[0m"


def test_an_error_names_a_bounded_number_of_places() -> None:
    text = str(ModelError("wrong", where=[f"node{i}" for i in range(10_000)]))
    assert len(text) < 500 and "and 9988 more" in text
