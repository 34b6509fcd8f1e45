"""Text from a model, made safe to show: names in a file may hold anything, and a terminal obeys control characters.

Everything that is shown to a person goes through `shown`: errors, warnings, tables, logs. Files (JSON, HTML) escape by
their own rules.
"""

from __future__ import annotations

import unicodedata

SHOWN = 120  # characters of one name; a name of a megabyte is shown by its two ends
# Not Cn and Co (unassigned, private use): those print as a box. Cf has the marks that reverse the direction of text.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def escaped(text: str, keep: str = "") -> str:
    """`text` with every control, format and line separator character as a backslash escape, but for those in `keep`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSAFE else _escape(c) for c in text)


def shown(text: object, width: int = SHOWN) -> str:
    """One name on one line: escaped, and where it is longer than `width` its two ends with a count between."""
    whole = str(text)
    if len(whole) <= width:
        return escaped(whole)
    head, tail = width * 2 // 3, width // 4
    return f"{escaped(whole[:head])}...({len(whole) - head - tail} more characters)...{escaped(whole[-tail:])}"


def paragraph(text: object, width: int = 2000) -> str:
    """A message of several lines: line breaks and tabs stay, all else as in `shown`."""
    whole = str(text)
    if len(whole) > width:
        whole = f"{whole[: width * 2 // 3]}...({len(whole) - width} more characters)...{whole[-width // 3 :]}"
    return escaped(whole, keep="\n\t")


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
