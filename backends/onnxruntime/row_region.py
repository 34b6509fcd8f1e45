"""Operators that treat every row [.., C] of a value alike, wherever it stands among the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from xform.backends.onnxruntime.index_map import sizes
from xform.graph.values import attribute, is_constant, is_op, rank_of

_UNARY = (
    "Cast", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Neg", "Abs", "Exp", "HardSwish", "HardSigmoid",
    "LeakyRelu", "Elu", "Softplus", "Mish", "Swish", "Identity",
)  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div")

_Kind = Literal["rows", "uniform"]


@dataclass(frozen=True)
class Region:
    """The operators from a value on that treat its rows alike.

    Attributes:
        nodes: The operators.
        rows: Their results with a row for each row of the value.
        exits: Of these, the ones that something else reads.
    """

    nodes: tuple[ir.Node, ...]
    rows: tuple[ir.Value, ...]
    exits: tuple[ir.Value, ...]

    def reshape(self, leading: tuple[int, ...]) -> None:
        """Declare other leading axes for all rows."""
        for value in self.rows:
            value.shape = ir.Shape((*leading, (sizes(value) or ())[-1]))


def region_from(entry: ir.Value) -> Region | None:
    """The region that reads `entry`; None where anything else does too, or reads a number that stands for all rows."""
    kinds: dict[ir.Value, _Kind] = {entry: "rows"}
    nodes: dict[ir.Node, None] = {}
    queue = [entry]
    while queue:
        for node, _ in queue.pop().uses():  # one with several operands is taken when the last of them is known
            kind = None if node in nodes or node.graph is not entry.graph else _kind(node, kinds)
            if kind is not None:
                nodes[node] = None
                kinds.update(dict.fromkeys(node.outputs, kind))
                if is_op(node, "DynamicQuantizeLinear"):  # scale and zero point
                    kinds.update(dict.fromkeys(node.outputs[1:], "uniform"))
                queue.extend(node.outputs)
    left = [v for v in kinds if v.is_graph_output() or any(user not in nodes for user, _ in v.uses())]
    rows = tuple(v for v, kind in kinds.items() if kind == "rows" and v is not entry)
    if not left or entry in left or any(kinds[v] == "uniform" for v in left) or any(sizes(v) is None for v in rows):
        return None
    return Region(tuple(nodes), rows, tuple(left))


def _kind(node: ir.Node, kinds: dict[ir.Value, _Kind]) -> _Kind | None:
    """What a node gives whose operands are constants, rows and numbers for all rows; None of another one."""
    given = [value for value in node.inputs if value is not None]
    if any(value not in kinds and not is_constant(value) for value in given):
        return None
    of_rows = [kinds.get(value) == "rows" for value in given]
    if not any(of_rows):
        return "uniform" if is_op(node, *_UNARY, *_BINARY) else None
    if is_op(node, *_UNARY, "DynamicQuantizeLinear"):
        return "rows"
    if is_op(node, *_BINARY):
        fits = all(row or rank_of(value) in (0, 1) for value, row in zip(given, of_rows, strict=True))
        return "rows" if fits else None
    vectors = of_rows[0] and not any(of_rows[1:]) and all(rank_of(value) in (0, 1) for value in given[1:])
    if is_op(node, "LayerNormalization"):  # an axis from the front would mean another one for rows of another rank
        return "rows" if vectors and attribute(node, "axis", -1) == -1 and len(node.outputs) == 1 else None
    if is_op(node, "MatMul", "MatMulInteger"):
        weights = of_rows[0] and not any(of_rows[1:]) and rank_of(given[1]) == 2 and is_constant(given[1])
        return "rows" if weights and all(rank_of(value) in (0, 1) for value in given[2:]) else None
    return None
