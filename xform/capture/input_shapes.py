"""Input shapes that the user fixes: a dynamic dim becomes a number, wherever its name stands in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import onnx_ir as ir

from xform.errors import UsageError
from xform.graph import dims
from xform.graph.values import Dim, shape_of
from xform.text import shown

InputShapes = Mapping[str, Sequence[int | str | None]]


def fix_input_shapes(model: ir.Model, shapes: InputShapes) -> None:
    """Give inputs of `model` the shapes that the user asks for, in place.

    Args:
        model: Before shapes are inferred, which brings the numbers to every other value.
        shapes: Per input one entry for each dim: a number for a dynamic dim, another name for one, or None (-1 too) to
            leave it as it is. A dim of one name gets one number in all inputs. The rank of an input whose rank is
            unknown is set.

    Raises:
        UsageError: An input that the model does not have, another rank, a static dim of another size, or two numbers
            for one name.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    numbers: dict[str, int] = {}
    names: dict[str, str] = {}
    wanted: dict[str, list[Dim]] = {}
    for name, given in shapes.items():
        if name not in inputs:
            close = get_close_matches(name, inputs, n=1)
            known = ", ".join(map(shown, inputs)) or "none"
            hint = f"did you mean {shown(close[0])!r}?" if close else f"its inputs are: {known}"
            raise UsageError(f"the model has no input named {shown(name)!r}", hint=hint)
        wanted[name] = _wanted(inputs[name], _checked(name, given), numbers, names)
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([_substituted(dim, numbers, names) for dim in shape_of(value) or ()])
    for name, shape in wanted.items():
        inputs[name].shape = ir.Shape([_substituted(dim, numbers, names) for dim in shape])
    if numbers:  # a name that only outputs have may stand for a size that follows from the numbers
        left = {dim for value in inputs.values() for dim in shape_of(value) or () if isinstance(dim, str)}
        for value in model.graph.outputs:
            if value.shape is not None and not value.is_graph_input():
                kept = [dim if isinstance(dim, int) or dim in left else None for dim in shape_of(value) or ()]
                value.shape = ir.Shape(kept)


def _checked(name: str, given: Sequence[int | str | None]) -> list[Dim]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UsageError(
            f"the shape of input {shown(name)!r} is not a list of dims", hint='write {"x": (1, 3, 224, 224)}'
        )
    for dim in given:
        named = isinstance(dim, str) and dim.isidentifier()
        sized = isinstance(dim, int) and not isinstance(dim, bool) and dim >= -1
        if not (dim is None or named or sized):
            raise UsageError(
                f"the shape of input {shown(name)!r} has a dim {dim!r}",
                hint="give a number, a name for a dynamic dim, or -1 to leave the dim as it is",
            )
    return [None if dim == -1 else dim for dim in given]


def _wanted(value: ir.Value, given: list[Dim], numbers: dict[str, int], names: dict[str, str]) -> list[Dim]:
    """The new shape of an input; what it says about named dims joins `numbers` and `names`."""
    name, declared = shown(value.name or ""), shape_of(value)
    if declared is None:
        return given
    if len(declared) != len(given):
        raise UsageError(f"input {name!r} has {len(declared)} dims ({_text(declared)}), not {len(given)}")
    result: list[Dim] = []
    for axis, (old, new) in enumerate(zip(declared, given, strict=True)):
        if new is None or new == old:
            result.append(old)
        elif isinstance(old, int):
            raise UsageError(
                f"dim {axis} of input {name!r} is {old} in the model and cannot become {new}",
                hint="only dynamic dims can be given another size; export the model again for this one",
            )
        else:
            if old is not None and isinstance(new, int) and numbers.setdefault(old, new) != new:
                raise UsageError(f"dim {shown(old)!r} was given two sizes, {numbers[old]} and {new}")
            if old is not None and isinstance(new, str) and names.setdefault(old, new) != new:
                raise UsageError(f"dim {shown(old)!r} was given two names, {names[old]!r} and {new!r}")
            result.append(new)
    return result


def _substituted(dim: Dim, numbers: Mapping[str, int], names: Mapping[str, str]) -> Dim:
    """A dim with the names in it replaced; left open where only part of an expression is known."""
    if not isinstance(dim, str) or not (numbers or names):
        return dim
    if dim in names:
        return names[dim]
    used = dims.symbols(dims.parse(dim))
    if used <= numbers.keys():
        return dims.evaluate(dims.parse(dim), numbers)
    return None if used & (numbers.keys() | names.keys()) else dim


def _text(shape: Sequence[Dim]) -> str:
    return ", ".join("?" if dim is None else str(dim) for dim in shape)


__all__ = ["InputShapes", "fix_input_shapes"]
