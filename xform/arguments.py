"""Checking the arguments of `optimize` before any work: each error says what was given and what can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xform.errors import UsageError
from xform.passes import PASSES
from xform.pipeline.presets import PRESETS
from xform.progress import Bar, Progress
from xform.rewrite.passes import Pass
from xform.target import Target


def check_types(**arguments: Any) -> None:
    """Refuse arguments of `optimize` that are of another type than any that it takes.

    Raises:
        UsageError: Naming the argument and what it can be.
    """
    for name, value in arguments.items():
        kinds, words = _KINDS[name]
        wrong = isinstance(value, bool) and bool not in kinds
        if wrong or not isinstance(value, kinds):
            raise UsageError(f"{name} must be {words}, not {value!r}"[:400])


_FLAG = ((bool,), "True or False")
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "target": ((str, Target), 'a name such as "cpu", or a Target'),
    "preset": ((str,), f"the name of a preset ({', '.join(PRESETS)})"),
    "backend": ((str, type(None)), "the name of a backend, or None"),
    "verify": ((str,), "'off', 'final' or 'each'"),
    "tune": ((str,), "'off', 'quick' or 'full'"),
    "padding": ((str,), "'padded' or 'packed'"),
    "precision": ((str, type(None)), "the name of a dtype, or None"),
    "compile": ((str,), "'off', 'inductor' or 'max-autotune'"),
    "opset": ((int, type(None)), "a number, or None"),
    "tolerance": ((int, float, Mapping, type(None)), "a number, a dict of numbers by output, or None"),
    "strict": _FLAG,
    "portable": _FLAG,
    "compile_only": _FLAG,
}


def listed_passes(passes: Any) -> list[str | Pass] | None:
    """The passes in a list: one name, one pass, or several, each a name, a Pass, or a class of passes.

    Raises:
        UsageError: Something else, or a class whose passes need options.
    """
    if passes is None:
        return None
    if isinstance(passes, str | Pass | type):
        passes = [passes]
    if isinstance(passes, Mapping) or not isinstance(passes, Sequence):
        raise UsageError(
            f"passes must be a list of names and Pass objects, not a {type(passes).__name__}",
            hint='for example passes=["raise_gelu"]',
        )
    return [_pass(one) for one in passes]


def _pass(one: Any) -> str | Pass:
    if isinstance(one, type) and issubclass(one, Pass):
        required = [
            field.name
            for field in dataclasses.fields(one)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        if required:
            raise UsageError(
                f"the pass {one.__name__} needs {', '.join(required)}",
                hint=f"give an object: {one.__name__}({required[0]}=...)",
            )
        return one()
    if not isinstance(one, str | Pass):
        raise UsageError(f"{one!r} is not a pass"[:400], hint=f"give a name ({', '.join(list(PASSES)[:4])}, ...)")
    return one


def parsed_target(target: str | Target) -> Target:
    """The target; "cuda:0" says a device, which a target is not.

    Raises:
        UsageError: An unknown target.
    """
    if isinstance(target, str):
        kind, _, index = target.partition(":")
        if index.isdigit() and kind in ("cpu", "cuda"):
            raise UsageError(
                f"target {target!r} names one device, a target is a kind of device",
                hint=f'use target="{kind}"; for another GPU than the first, set CUDA_VISIBLE_DEVICES={index}',
            )
    return Target.parse(target)


def progress_of(progress: Any) -> Progress | None:
    """The function that is told of progress; a bar for True.

    Raises:
        UsageError: Neither a function nor True, False or None.
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return Bar()
    if not callable(progress):
        raise UsageError(f"progress must be True or a function of (step, done, total), not {progress!r}"[:400])
    checked: Progress = progress
    return checked


def check_inputs(inputs: Any) -> None:
    """Refuse a number or a text as the example inputs of a module.

    Raises:
        UsageError: Saying in which forms inputs come.
    """
    if isinstance(inputs, str | bytes | int | float):
        raise UsageError(
            f"inputs={inputs!r} is not an example input"[:400],
            hint="give a tensor, a tuple of arguments, a dict of keyword arguments, or (tuple, dict)",
        )
