"""The table of motifs: each draws a few operators behind a value, and says which values it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from differential_sketch import I32, I64, Sketch, Value

Takes = Callable[[Value], bool]
Draw = Callable[[Sketch, Value], Value | None]


@dataclass(frozen=True)
class Motif:
    """One motif.

    Attributes:
        name: Its function's name.
        takes: Which values it can stand behind.
        draw: Draws it; None where the sketch cannot hold it.
        weight: How often it is drawn beside the others.
        dtypes: Float types of the graphs that may hold it; empty for all.
        opset: First opset that has its operators.
        flow: Whether it holds other motifs: branches, loops, functions.
    """

    name: str
    takes: Takes
    draw: Draw
    weight: float
    dtypes: tuple[int, ...]
    opset: int
    flow: bool


MOTIFS: dict[str, Motif] = {}


def motif(
    takes: Takes, *, weight: float = 1.0, dtypes: tuple[int, ...] = (), opset: int = 11, flow: bool = False
) -> Callable[[Draw], Draw]:
    """Enter a function into the table."""

    def enter(draw: Draw) -> Draw:
        name = draw.__name__
        if name in MOTIFS:
            raise ValueError(f"two motifs are named {name!r}")
        MOTIFS[name] = Motif(name, takes, draw, weight, dtypes, opset, flow)
        return draw

    return enter


def any_value(x: Value) -> bool:
    """Every value."""
    return True


def any_float(x: Value) -> bool:
    """Floats of any rank."""
    return x.is_float


def integers(x: Value) -> bool:
    """Integers of any rank."""
    return x.dtype in (I32, I64)


def axes_float(x: Value) -> bool:
    """Floats with an axis."""
    return x.is_float and x.rank >= 1


def channels_last(x: Value) -> bool:
    """Floats [.., C] of two or more axes with C known."""
    return x.is_float and x.rank >= 2 and x.last >= 2


def tokens(x: Value) -> bool:
    """Floats [N, S, C] with C known and even."""
    return x.is_float and x.rank == 3 and x.last >= 4 and x.last % 4 == 0


def image(x: Value) -> bool:
    """Floats [N, C, H, W] or with one or three axes in space, channels known."""
    return x.is_float and 3 <= x.rank <= 5 and isinstance(x.dims[1], int) and x.dims[1] >= 2


def plane(x: Value) -> bool:
    """Floats [N, C, H, W]."""
    return image(x) and x.rank == 4


def static_float(x: Value) -> bool:
    """Floats with an axis and every size but the first known."""
    return x.is_float and x.rank >= 2 and all(isinstance(d, int) for d in x.dims[1:])
