"""Targets of Reshapes that hold whatever the named dims are, 0 included.

In a target, 0 copies the operand's dim in that place, and -1 is what the others leave over. Beside a dim of 0 nothing
can be left over: Reshape(x [0, 12], [0, -1]) fails, where [0, 12] and a computed target work. A named dim may always be
0 (the last batch of a stream, a frame without detections), so -1 stands only beside numbers.
"""

from __future__ import annotations

from collections.abc import Sequence


def constant_target(wanted: Sequence[object], source: Sequence[object] | None) -> list[int] | None:
    """A constant target that reshapes a value of dims `source` to `wanted`; None if the target has to be computed.

    Args:
        wanted: Numbers, and names or expressions for dims that are no numbers; None for one that is not known.
        source: The same of the operand; None if its rank is unknown.
    """
    target: list[int] = []
    for place, size in enumerate(wanted):
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif size is not None and source is not None and place < len(source) and source[place] == size:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1 or (-1 in target and 0 in target):
        return None
    return target
