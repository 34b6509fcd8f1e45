"""`--set PASS.OPTION=VALUE`: text to option values of the declared types."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from xform.cli.common import closest, split_names
from xform.errors import UsageError
from xform.text import shown

if TYPE_CHECKING:
    from xform.rewrite.passes import Pass

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def requested_passes(preset: str, names: str | None, settings: Sequence[str] | None) -> list[Pass]:
    """The pass objects that `--preset`, `--passes` and `--set` ask for. Raises UsageError."""
    from xform.pipeline.presets import resolve

    return resolve(preset, split_names(names), parse_settings(settings))


def parse_settings(texts: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """`["fold_constants.input_limit=1024"]` to {"fold_constants": {"input_limit": 1024}}.

    Raises:
        UsageError: Not of this form, an unknown pass or option, one given twice, or a value of the wrong type.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in texts or ():
        match = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", text)
        if match is None:
            raise UsageError(f"--set {shown(text)!r} is no option of a pass", hint="write PASS.OPTION=VALUE")
        pass_name, option, value = match[1], match[2], match[3].strip()
        if option in settings.get(pass_name, {}):
            raise UsageError(f"--set {pass_name}.{option} was given twice")
        settings.setdefault(pass_name, {})[option] = convert(value, option_type(pass_name, option), text)
    return settings


def option_type(pass_name: str, option: str) -> Any:
    """The declared type of an option. Raises UsageError where the pass or the option does not exist."""
    from xform.passes import PASSES

    if pass_name not in PASSES:
        raise UsageError(f"unknown pass {pass_name!r}", hint=closest(pass_name, PASSES))
    hints = get_type_hints(PASSES[pass_name])
    known = [field.name for field in fields(PASSES[pass_name])] if is_dataclass(PASSES[pass_name]) else []
    if option not in known:
        hint = closest(option, known) if known else "it has no options"
        raise UsageError(f"pass {pass_name!r} has no option {option!r}", hint=hint)
    return hints[option]


def convert(value: str, kind: Any, text: str) -> Any:
    """`value` as `kind`: bool, int, float, str, None, a Literal, a tuple of one of these, or a union of them.

    Raises:
        UsageError: It is none of them; `text` is the whole option, for the message.
    """
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for choice in sorted(choices, key=lambda c: c is str):  # text takes anything, so it comes last
        try:
            return _as(value, choice)
        except ValueError:
            continue
    wanted = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices)
    raise UsageError(f"--set {shown(text)!r}: {value!r} is not of type {wanted.replace('NoneType', 'none')}")


def _as(value: str, kind: Any) -> Any:
    """`value` as one plain type; ValueError where it is not."""
    if kind is type(None):
        if value.lower() != "none":
            raise ValueError(value)
        return None
    if kind is bool:
        if value.lower() not in _TRUTH:
            raise ValueError(value)
        return _TRUTH[value.lower()]
    if get_origin(kind) is Literal:
        return (
            {str(choice): choice for choice in get_args(kind)}[value]
            if value in map(str, get_args(kind))
            else _no(value)
        )
    if get_origin(kind) is tuple:
        return tuple(_as(part.strip(), get_args(kind)[0]) for part in value.split(",") if part.strip())
    if kind in (int, float, str):
        return kind(value)
    raise ValueError(value)


def _no(value: str) -> Any:
    raise ValueError(value)
