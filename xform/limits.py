"""Limits on what a model may ask of this machine: a file of a kilobyte can ask for all of its memory.

Each limit has a name, a default that real models stay far below, and the same meaning everywhere. Whoever is about to
allocate, expand or wait calls `check`; past the limit it raises `LimitError` (exit code 3), which names the limit and
how to raise it. In Python `optimize(limits={"memory": 2**34})`; on the command line `--limit memory=16GiB`.

What is dangerous is not size but *amplification*: a model that brings gigabytes of weights may compute with gigabytes.
So each limit is what a model may ask for that brings nothing, and what a model brings earns more (`EARNED`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from xform.errors import LimitError, UsageError
from xform.text import shown


@dataclass(frozen=True)
class Limits:
    """What a model may ask for.

    Attributes:
        memory: Bytes of the intermediate values of one run in verification, and of any one value that is computed from
            constants; besides 16 bytes for each byte of weights and inputs.
        constants: Bytes of all constants together that capture makes from less (sparse tensors made dense, constants
            folded); besides 16 bytes for each byte of the weights.
        nodes: Nodes after functions are inlined; besides 16 for each node that the file writes down.
        depth: Levels of nested graphs, and of functions that call functions.
        seconds: Wall time of one run of a model in verification; as much again for each 4 MiB of weights and inputs.
    """

    memory: int = 512 << 20
    constants: int = 256 << 20
    nodes: int = 20_000
    depth: int = 64
    seconds: float = 10.0


# What each byte (for `nodes`: each node) that a model brings adds to a limit. For `seconds` it is a factor of the limit
# itself: a model of 4 MiB gets twice the time, so a limit that was raised for a slow machine carries over.
EARNED: Mapping[str, float] = {"memory": 16, "constants": 16, "nodes": 16, "depth": 0, "seconds": 1 / (4 << 20)}
UNITS: Mapping[str, str] = {"memory": "bytes", "constants": "bytes", "nodes": "", "depth": "", "seconds": "s"}
_CURRENT: ContextVar[Limits | None] = ContextVar("xform_limits", default=None)  # None: the defaults
_DEFAULT = Limits()
MAX = 2**60  # of any limit: no machine has more, and sums of such numbers fit where numbers are bounded


def current() -> Limits:
    """The limits in force."""
    return _CURRENT.get() or _DEFAULT


def allowed(name: str, brought: float = 0) -> float:
    """What the limit called `name` allows a model that brings so much.

    Args:
        brought: Bytes of the weights and inputs that the model brings; for `nodes`, the nodes that it writes down.
    """
    base = float(getattr(current(), name))
    return base * (1 + EARNED[name] * brought) if name == "seconds" else base + EARNED[name] * brought


def check(name: str, asked: float, what: str, where: str | tuple[str, ...] = (), brought: float = 0) -> None:
    """Raise LimitError where `asked` is more than the limit called `name` allows.

    Args:
        what: What asks for it, the subject of the sentence: "constant 'w' of shape [1, 2]".
        where: Original node names.
        brought: See `allowed`.
    """
    if asked > allowed(name, brought):
        raise exceeded(name, f"{what} needs {_amount(name, asked)}", where, brought)


def exceeded(name: str, what: str, where: str | tuple[str, ...] = (), brought: float = 0) -> LimitError:
    """The error of a model that is past a limit; for where that is seen while it happens.

    Args:
        what: The first half of the sentence: "the model runs without end".
    """
    return LimitError(
        name,
        f"{what}, limit {name!r} allows this model {_amount(name, allowed(name, brought))}",
        where=where,
        hint=f"if the model is meant to be so, raise the limit: limits={{{name!r}: N}}",
    )


def _amount(name: str, number: float) -> str:
    """A number with its unit. A hostile file can ask for numbers of thousands of digits."""
    text = f"{number:,.0f}" if number < 1e18 else "more than 10^18"
    return f"{text} {UNITS[name]}" if UNITS[name] else text


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
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= MAX:
            raise UsageError(f"limit {name!r} must be a number above 0 and at most 2^60, not {shown(repr(number))}")
    numbers: dict[str, Any] = dict(given)
    return replace(_DEFAULT, **numbers)


class Unpacked(dict[str, Any]):
    """Arrays by name, from a file that may be compressed: they bring what the file holds, not what it unpacks to.

    Attributes:
        packed: Bytes of the file.
        nbytes: Bytes of the arrays.
    """

    def __init__(self, arrays: Mapping[str, Any], packed: int) -> None:
        super().__init__(arrays)
        self.packed = packed
        self.nbytes = sum(map(_nbytes, arrays.values()))


def earned_by(inputs: object) -> Limits:
    """The limits in force, raised by what inputs that the user gave earn: no model can declare those.

    Args:
        inputs: One set of arrays by name, or a list of sets, of which the largest counts; anything else earns nothing.
    """
    sets = [inputs] if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list) else []
    given = max((_brought(one) for one in sets if isinstance(one, Mapping)), default=0)
    now = current()
    return replace(now, memory=int(now.memory + EARNED["memory"] * given))


def _brought(arrays: Mapping[str, Any]) -> int:
    return min(arrays.nbytes, arrays.packed) if isinstance(arrays, Unpacked) else sum(map(_nbytes, arrays.values()))


def _nbytes(value: object) -> int:
    return int(getattr(value, "nbytes", 0))


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Put limits in force, for this thread, inside."""
    token = _CURRENT.set(limits)
    try:
        yield
    finally:
        _CURRENT.reset(token)
