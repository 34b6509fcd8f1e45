"""Control flow: If, Loop and Scan over submodules, and sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Body = Callable[..., tuple[Any, ...]]


def given_or(value: Any, default: Any) -> Any:
    """An input that may be left out."""
    return default if value is None else value


def branch(condition: torch.Tensor, then: Body, otherwise: Body, then_args: Any, else_args: Any) -> tuple[Any, ...]:
    """ONNX's If: runs one of the bodies."""
    return then(*then_args) if bool(condition) else otherwise(*else_args)


def loop(
    body: Body,
    trips: torch.Tensor | int | None,
    condition: torch.Tensor | None,
    carried: Sequence[Any],
    outer: Sequence[Any],
    scans: Sequence[tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[Any, ...]:
    """ONNX's Loop: `body(i, condition, *carried, *outer)` gives the next condition, the carried values, scan outputs.

    Args:
        trips: Most rounds, None for no bound.
        condition: Whether to go on; None for always.
        scans: dtype and shape of an element of each scan output, for a loop of no rounds.
    """
    state = list(carried)
    gathered: list[list[torch.Tensor]] = [[] for _ in scans]
    going = True if condition is None else bool(condition)
    like = next((v for v in (condition, *carried, *outer) if isinstance(v, torch.Tensor)), None)
    device = None if like is None else like.device
    most = None if trips is None else int(trips)
    i = 0
    while going and (most is None or i < most):
        passed = torch.ones((), dtype=torch.bool, device=device) if condition is None else condition
        condition, *results = body(i, passed, *state, *outer)
        state = results[: len(state)]
        for held, result in zip(gathered, results[len(state) :], strict=True):
            held.append(result)
        going = bool(condition)
        i += 1
    stacked = [
        torch.stack(held) if held else torch.empty((0, *shape), dtype=dtype, device=device)
        for held, (dtype, shape) in zip(gathered, scans, strict=True)
    ]
    return (*state, *stacked)


def scan(
    body: Body,
    states: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    outer: Sequence[Any],
    input_axes: Sequence[int],
    input_reversed: Sequence[int],
    output_axes: Sequence[int],
    output_reversed: Sequence[int],
) -> tuple[torch.Tensor, ...]:
    """ONNX's Scan: `body(*states, *slices, *outer)` over slices of the inputs; states, then stacked outputs."""
    current = list(states)
    length = inputs[0].shape[input_axes[0]]
    gathered: list[list[torch.Tensor]] = [[] for _ in output_axes]
    for step in range(length):
        slices = [
            x.select(axis, length - 1 - step if backward else step)
            for x, axis, backward in zip(inputs, input_axes, input_reversed, strict=True)
        ]
        results = body(*current, *slices, *outer)
        current = list(results[: len(current)])
        for held, result in zip(gathered, results[len(current) :], strict=True):
            held.append(result)
    stacked = [
        torch.stack(held[::-1] if backward else held, dim=axis)
        for held, axis, backward in zip(gathered, output_axes, output_reversed, strict=True)
    ]
    return (*current, *stacked)


def concat_sequence(sequence: Sequence[torch.Tensor], axis: int, new_axis: bool) -> torch.Tensor:
    """ConcatFromSequence."""
    return torch.stack(tuple(sequence), axis) if new_axis else torch.cat(tuple(sequence), axis)


def insert(sequence: Sequence[Any], element: Any, position: int | None = None) -> list[Any]:
    """SequenceInsert, at the end by default."""
    result = list(sequence)
    result.insert(len(result) if position is None else position, element)
    return result


def erase(sequence: Sequence[Any], position: int = -1) -> list[Any]:
    """SequenceErase, at the end by default."""
    result = list(sequence)
    del result[position]
    return result


def split_to_sequence(
    x: torch.Tensor, split: int | Sequence[int] | None, axis: int, keepdims: bool
) -> list[torch.Tensor]:
    """SplitToSequence: parts of one size, of given sizes, or (None) single slices."""
    if split is None:
        return list(torch.split(x, 1, axis)) if keepdims else list(torch.unbind(x, axis))
    return list(torch.split(x, split if isinstance(split, int) else list(split), axis))


def has_element(optional: Any = None) -> torch.Tensor:
    """OptionalHasElement."""
    return torch.tensor(optional is not None)


def map_sequence(body: Body, sequence: Sequence[Any], others: Sequence[Any], outer: Sequence[Any], count: int) -> Any:
    """SequenceMap: `body` on each element, with further sequences in step; one list for each of `count` outputs."""
    columns: list[list[Any]] = [[] for _ in range(count)]
    for index, element in enumerate(sequence):
        along = [other[index] if isinstance(other, (list, tuple)) else other for other in others]
        for column, result in zip(columns, body(element, *along, *outer), strict=True):
            column.append(result)
    return tuple(columns)
