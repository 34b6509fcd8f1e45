"""Limits on what a model may ask of this machine: a file of a kilobyte can ask for all of its memory.

Each limit has a name, a default that real models stay far below, and the same meaning everywhere. Whoever is about to
allocate, expand or wait calls `check`; past the limit it raises `LimitError` (exit code 3), which names the limit and
how to raise it. In Python `optimize(limits={"memory": 2**34})`; on the command line `--limit memory=16GiB`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from xform.errors import LimitError, UsageError


@dataclass(frozen=True)
class Limits:
    """What a model may ask for.

    Attributes:
        memory: Bytes that one value which the model alone decides about may take: a constant folded, a sparse
            tensor made dense, an intermediate value of verification.
        constants: Bytes of all constants together that capture makes from less (folded, expanded, repeated).
        nodes: Nodes after functions are inlined.
        depth: Levels of nested graphs, and of functions that call functions.
        seconds: Wall time of one run of a model in verification.
    """

    memory: int = 4 << 30
    constants: int = 1 << 30
    nodes: int = 1_000_000
    depth: int = 64
    seconds: float = 300.0


UNITS: Mapping[str, str] = {"memory": "bytes", "constants": "bytes", "nodes": "", "depth": "", "seconds": "s"}
_CURRENT: ContextVar[Limits | None] = ContextVar("xform_limits", default=None)  # None: the defaults
_DEFAULT = Limits()


def current() -> Limits:
    """The limits in force."""
    return _CURRENT.get() or _DEFAULT


def check(name: str, asked: float, what: str, where: str | tuple[str, ...] = ()) -> None:
    """Raise LimitError where `asked` is more than the limit called `name` allows.

    Args:
        what: What asks for it, the subject of the sentence: "constant 'w' of shape [1, 2]".
        where: Original node names.
    """
    allowed = getattr(current(), name)
    if asked > allowed:
        unit = f" {UNITS[name]}" if UNITS[name] else ""
        raise LimitError(
            name,
            f"{what} needs {asked:,.0f}{unit}, limit {name!r} is {allowed:,.0f}{unit}",
            where=where,
            hint=f"if the model is meant to be so, raise the limit: limits={{{name!r}: N}}",
        )


def limits_of(given: Mapping[str, float] | Limits | None) -> Limits:
    """Limits from what a user gave: names and numbers; the defaults for the rest.

    Raises:
        UsageError: An unknown name, or a number that is not positive.
    """
    if given is None or isinstance(given, Limits):
        return given or _DEFAULT
    if not isinstance(given, Mapping):
        raise UsageError(f"limits must be a dict, not a {type(given).__name__}", hint='write limits={"memory": 2**34}')
    known = [field.name for field in fields(Limits)]
    for name, number in given.items():
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the limits are: {', '.join(known)}"
            raise UsageError(f"there is no limit {name!r}", hint=hint)
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise UsageError(f"limit {name!r} must be a number above 0, not {number!r}")
    numbers: dict[str, Any] = dict(given)
    return replace(_DEFAULT, **numbers)


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Put limits in force, for this thread, inside."""
    token = _CURRENT.set(limits)
    try:
        yield
    finally:
        _CURRENT.reset(token)
