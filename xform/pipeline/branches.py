"""Branches that depend on data: which of them an input set goes through, inputs that reach others, and forcing them.

A branch that no input reached was compared by nobody. So conditions are made outputs of a copy of the captured model,
those inside branches and loop bodies too; inputs are searched that turn them; and what is left is compared with the
condition replaced by a constant, in the captured and in the rewritten graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import constant, display_name, scalar
from xform.pipeline.random_inputs import InputCase

Branch = tuple[str, bool]  # name of the first output of an If, as nodes may lack one, and the value of its condition

_SHIFTS = (100.0, -100.0, 1e4, -1e4)
_FACTORS = (-1.0, 10.0, 1000.0, 1e-3, 0.0)
_MAX_CONSTANTS = 8  # of the graph's own comparisons
_COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}


def branches(model: ir.Model) -> list[Branch]:
    """Both branches of every If whose condition is no constant; Ifs whose outputs share a name cannot be told apart."""
    found: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.op_type == "If" and node.domain == "" and constant(node.inputs[0]) is None:
            found[_key(node)] = found.get(_key(node), 0) + 1
    return [(name, side) for name, times in found.items() if name and times == 1 for side in (True, False)]


def _key(node: ir.Node) -> str:
    return node.outputs[0].name or ""


def in_words(model: ir.Model, branch: Branch) -> str:
    """`the then-branch of 'node'`."""
    node = next(node for node in model.graph.all_nodes() if _key(node) == branch[0])
    return f"the {'then' if branch[1] else 'else'}-branch of {display_name(node)!r}"


class Watch:
    """A copy of a model that says which branches it goes through.

    Attributes:
        model: The copy; its only outputs are conditions.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = clone(model)
        self._exposed = _expose(self.model.graph)
        self._names: dict[str, str] = {}
        outputs = []
        for index, (name, value) in enumerate(self._exposed):
            value.name = value.name or f"xform_condition_{index}"
            self._names[value.name] = name
            outputs.append(value)
        self.model.graph.outputs.clear()
        self.model.graph.outputs.extend(outputs)

    def reached(self, outputs: Mapping[str, Any]) -> set[Branch]:
        """The branches, from what the copy gave."""
        found: set[Branch] = set()
        for output, name in self._names.items():
            for number in np.asarray(outputs[output]).reshape(-1):
                if number > 0:
                    found.add((name, bool(number == 2)))
        return found


def _expose(graph: ir.Graph) -> list[tuple[str, ir.Value]]:
    """Values [n] int64 of this graph that tell conditions by the names of their Ifs: 0 not met, 1 false, 2 true."""
    found: list[tuple[str, ir.Value]] = []
    for node in list(graph):
        if node.domain:
            continue
        if node.op_type == "If":
            condition = node.inputs[0]
            if _key(node) and condition is not None and constant(condition) is None:
                found.append((_key(node), _coded(graph, node, condition)))
            found += _of_branches(graph, node)
        elif node.op_type == "Loop":
            found += _of_body(graph, node)
    return found


def _of_branches(graph: ir.Graph, node: ir.Node) -> list[tuple[str, ir.Value]]:
    sides = [node.attributes[key].as_graph() for key in ("then_branch", "else_branch")]
    found: list[tuple[str, ir.Value]] = []
    for side, other in ((sides[0], sides[1]), (sides[1], sides[0])):
        for name, value in _expose(side):
            output = _add_output(node, f"{value.name}_out")
            never = _emit(other, None, "Constant", [], {"value": ir.tensor(np.zeros(1, np.int64))}, f"{value.name}_0")
            side.outputs.append(value)
            other.outputs.append(never)
            found.append((name, output))
    return found


def _of_body(graph: ir.Graph, node: ir.Node) -> list[tuple[str, ir.Value]]:
    body = node.attributes["body"].as_graph()
    found = []
    for name, value in _expose(body):
        flat = _reshaped(body, None, value, f"{value.name}_largest")
        largest = _emit(body, None, "ReduceMax", [flat], {"keepdims": 1}, f"{value.name}_max")
        smallest = _emit(body, None, "ReduceMin", [flat], {"keepdims": 1}, f"{value.name}_min")
        both = _emit(body, None, "Concat", [largest, smallest], {"axis": 0}, f"{value.name}_both")
        body.outputs.append(both)
        output = _add_output(node, f"{value.name}_scan")
        found.append((name, _reshaped(graph, node, output, f"{value.name}_flat")))
    return found


def _coded(graph: ir.Graph, before: ir.Node, condition: ir.Value) -> ir.Value:
    """1 + condition as int64 [1]."""
    stem = f"xform_watched_{_key(before)}"
    number = _emit(graph, before, "Cast", [condition], {"to": int(ir.DataType.INT64)}, f"{stem}_int", ahead=True)
    one = _emit(graph, before, "Constant", [], {"value": ir.tensor(np.ones(1, np.int64))}, f"{stem}_1", ahead=True)
    total = _emit(graph, before, "Add", [number, one], {}, f"{stem}_sum", ahead=True)
    return _reshaped(graph, before, total, f"{stem}_condition", ahead=True)


def _reshaped(graph: ir.Graph, at: ir.Node | None, value: ir.Value, name: str, ahead: bool = False) -> ir.Value:
    shape = ir.tensor(np.asarray([-1], np.int64))
    to = _emit(graph, at, "Constant", [], {"value": shape}, f"{name}_shape", ahead=ahead)
    after = at if ahead or at is None else to.producer()
    return _emit(graph, after, "Reshape", [value, to], {}, name, ahead=ahead)


def _emit(
    graph: ir.Graph,
    at: ir.Node | None,
    op: str,
    inputs: list[ir.Value],
    attributes: dict[str, Any],
    name: str,
    ahead: bool = False,
) -> ir.Value:
    """A new node at the end, or next to `at`."""
    node = ir.node(op, inputs, attributes)
    node.name = node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    if at is None:
        graph.append(node)
    elif ahead:
        graph.insert_before(at, node)
    else:
        graph.insert_after(at, node)
    return node.outputs[0]


def _add_output(node: ir.Node, name: str) -> ir.Value:
    node.resize_outputs(len(node.outputs) + 1)
    output = node.outputs[-1]
    output.name, output.type = name, ir.TensorType(ir.DataType.INT64)
    return output


def forced(model: ir.Model, branch: Branch) -> ir.Model | None:
    """A copy whose If of this output always takes this side; None where there is no such If, or several."""
    copy = clone(model)
    places = [n for n in copy.graph.all_nodes() if n.op_type == "If" and n.domain == "" and _key(n) == branch[0]]
    if len(places) != 1:
        return None
    node = places[0]
    condition = ir.node("Constant", [], {"value": ir.tensor(np.asarray(branch[1]))})
    condition.name = condition.outputs[0].name = f"xform_forced_{branch[0]}"
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, condition)
    node.replace_input_with(0, condition.outputs[0])
    return copy


def attempts(model: ir.Model, case: InputCase) -> Iterator[InputCase]:
    """Sets of other values at the sizes of `case`, which may go another way: scaled, shifted, filled, turned round."""
    numbers = _numbers(model)
    changes: list[tuple[str, Any]] = [("", lambda a: ~a if a.dtype.kind == "b" else -a)]
    changes += [(f"all {fill}", _filling(fill)) for fill in (0, 1)]
    changes += [(f"times {factor:g}", _scaling(factor)) for factor in _FACTORS]
    changes += [(f"plus {shift:g}", _shifting(shift)) for shift in _SHIFTS]
    for number in numbers:
        changes += [(f"all {fill:g}", _filling(fill)) for fill in (number, number - 1, number + 1)]
    for words, change in changes:
        arrays = {name: _changed(array, change) for name, array in case.arrays.items()}
        yield InputCase(arrays, case.sizes, case.source, (), f"values {words or 'of the other sign'}", True)


def _numbers(model: ir.Model) -> list[float]:
    """What the graph compares with."""
    found: dict[float, None] = {}
    for node in model.graph.all_nodes():
        for value in node.inputs if node.op_type in _COMPARISONS else ():
            number = scalar(value)
            if number is not None and np.isfinite(number):
                found[float(number)] = None
    return list(found)[:_MAX_CONSTANTS]


def _changed(array: Any, change: Any) -> Any:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        return array
    with np.errstate(all="ignore"):
        return np.asarray(change(array)).astype(array.dtype)


def _filling(fill: float) -> Any:
    return lambda a: np.full(a.shape, fill)


def _scaling(factor: float) -> Any:
    return lambda a: a * factor if a.dtype.kind == "f" else a


def _shifting(shift: float) -> Any:
    return lambda a: a + shift if a.dtype.kind == "f" else a
