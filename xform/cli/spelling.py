"""Errors are worded once, in the spelling of Python; here they become what one types on the command line.

`verify='off'` becomes `--verify off`, and `limits={'memory': N}` becomes `--limit memory=N`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Parameter of `xform.optimize` to option; parameters without an option have None, and stay as they are.
OPTIONS: Mapping[str, str | None] = {
    "target": "--target",
    "inputs": "--inputs",
    "dynamic": "--dynamic",
    "preset": "--preset",
    "passes": "--passes",
    "backend": "--backend",
    "calibration": "--calibration",
    "tolerance": "--tolerance",
    "verify": "--verify",
    "strict": "--strict",
    "opset": "--opset",
    "portable": "--portable",
    "precision": "--precision",
    "compile": "--compile",
    "compile_only": "--compile-only",
    "tune": "--tune",
    "padding": "--padding",
    "limits": "--limit",
    "threads": "--threads",
    "input_shapes": "--input-shape",
    "sizes": "--size",
    "seed": "--seed",
    "model": None,
    "progress": None,
}

_NAMES = "|".join(sorted((name for name, option in OPTIONS.items() if option), key=len, reverse=True))
_QUOTED = r"'[^'\n]*'|\"[^\"\n]*\""
_VALUE = rf"{_QUOTED}|\{{[^{{}}\n]*\}}|\[[^\[\]\n]*\]|[\w.]+"
_ASSIGNED = re.compile(rf"(?<![\w.\-`=])(?P<name>{_NAMES})=(?!=)(?P<value>{_VALUE})?")
_QUOTED_NAME = re.compile(rf"`(?P<name>{_NAMES})`")
_ENTRY = re.compile(rf"(?P<key>{_QUOTED})\s*:\s*(?P<value>\([^()]*\)|{_QUOTED}|[\w.*]+)")


def in_cli_spelling(text: str) -> str:
    """`text` with every parameter of `optimize`, and the value it is given, as the option that it is here."""
    text = _ASSIGNED.sub(_option, text)
    return _QUOTED_NAME.sub(lambda found: str(OPTIONS[found["name"]]), text)


def _option(found: re.Match[str]) -> str:
    option, value = str(OPTIONS[found["name"]]), found["value"]
    if value is None or value == "True":
        return option
    if value == "False":
        return f"no {option}"
    if value[0] == "{":
        entries = [f"{option} {_entry(option, entry)}" for entry in _ENTRY.finditer(value)]
        return " ".join(entries) or option
    if value[0] == "[":
        return f"{option} {','.join(part.strip().strip(_MARKS) for part in value[1:-1].split(','))}"
    return f"{option} {value.strip(_MARKS)}"


def _entry(option: str, entry: re.Match[str]) -> str:
    """One entry of a dict: `{"batch": (1, 8)}` as `batch=1:8`, `{"x": (1, 3)}` as `x:1,3`."""
    joint, between = (":", ",") if option == "--input-shape" else ("=", ":")
    value = between.join(part.strip().strip(_MARKS) for part in entry["value"].strip("()").split(",") if part.strip())
    return f"{entry['key'].strip(_MARKS)}{joint}{value}"


_MARKS = "'\""
