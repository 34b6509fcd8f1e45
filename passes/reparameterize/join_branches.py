"""Parallel feed-forward branches as one wider one.

    U1 f(W1 x + b1) + U2 f(W2 x + b2) = [U1 U2] f([W1; W2] x + [b1; b2])

for any f that treats elements alone, the same in both. The work is the same, in half as many products of twice the
width, and one Add goes away. Branches that are summed before f need no widening: that sum is linear, and
`merge_affine_maps` merges it, as it merges U1 h + U2 h. Two branches whose sums would have to move through f
(f(a) + f(b) is not f(a + b)) stay as wide as they are. Source: "Rethinking Vision Transformer Depth via Structural
Reparameterization", arXiv 2511.19718, which joins branches at the inputs of the nonlinearities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, constant, is_op, shape_of, used_once
from xform.passes.reparameterize import linear_map
from xform.patterns.adapter import ACTIVATIONS
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule


@dataclass(frozen=True)
class _Branch:
    """U f(W x + b) + c; every value in it is read once.

    Attributes:
        x: Operand.
        into, bias_in: W as [K, H] and b as [H], float64; b is None where there is none.
        activation: f; for SiLU its Mul.
        out, bias_out: U as [H, N] and c as [N].
        nodes: All of them.
    """

    x: ir.Value
    into: linear_map.LinearMap
    bias_in: Array | None
    activation: ir.Node
    out: linear_map.LinearMap
    bias_out: Array | None
    nodes: tuple[ir.Node, ...]


class WidenFeedForward(Rule):
    """Two parallel feed-forward branches over the same value, meeting in an Add."""

    name = "widen_feed_forward"
    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "Add")})

    def reach(self) -> int:
        return 8

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if len(node.inputs) != 2:
            return
        first, second = (_branch(value) for value in node.inputs)
        if first is None or second is None or first.x is not second.x or first.activation is second.activation:
            return
        reason = _difference(first, second)
        if reason is not None:
            yield Failure(reason, (node, first.activation, second.activation))
            return
        everything = [node, *first.nodes, *second.nodes]
        yield Match(nodes=dict(enumerate(everything)), roots=(node.outputs[0],), data={"branches": (first, second)})

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        first, second = match.data["branches"]
        hidden = build.op("MatMul", first.x, build.constant(_joined(first.into, second.into, 1), "wide_in"))
        if first.bias_in is not None or second.bias_in is not None:
            both = np.concatenate([_bias(b.bias_in, b.into) for b in (first, second)])
            hidden = build.op(
                "Add", hidden, build.constant(linear_map.narrowed(both, first.into.dtype), "wide_in_bias")
            )
        if is_op(first.activation, "Mul"):
            active = build.op("Mul", hidden, build.op("Sigmoid", hidden))
        else:
            attributes = {name: attr.value for name, attr in first.activation.attributes.items()}
            active = build.op(first.activation.op_type, hidden, *first.activation.inputs[1:], **attributes)
        result = build.op("MatMul", active, build.constant(_joined(first.out, second.out, 0), "wide_out"))
        if first.bias_out is None and second.bias_out is None:
            return result
        total = _bias(first.bias_out, first.out) + _bias(second.bias_out, second.out)
        return build.op("Add", result, build.constant(linear_map.narrowed(total, first.out.dtype), "wide_out_bias"))


def _joined(a: linear_map.LinearMap, b: linear_map.LinearMap, axis: int) -> ir.TensorProtocol:
    return linear_map.narrowed(np.concatenate([a.weight, b.weight], axis=axis), a.dtype)


def _bias(bias: Array | None, linear: linear_map.LinearMap) -> Array:
    return np.zeros(linear.output_channels()) if bias is None else bias


def _difference(a: _Branch, b: _Branch) -> str | None:
    """Why the branches are no one wider branch; None if they are."""
    f, g = a.activation, b.activation
    if f.op_type != g.op_type or {k: v.value for k, v in f.attributes.items()} != {
        k: v.value for k, v in g.attributes.items()
    }:
        return f"the branches have different nonlinearities ({f.op_type} and {g.op_type})"
    if not is_op(f, "Mul") and list(f.inputs[1:]) != list(g.inputs[1:]):
        return f"the branches give {f.op_type} different parameters"
    if a.into.dtype != b.into.dtype or a.out.dtype != b.out.dtype:
        return "the branches have weights of different types"
    return None


def _branch(value: ir.Value | None) -> _Branch | None:
    out = _linear(value)
    if out is None:
        return None
    operand, out_map, bias_out, out_nodes = out
    activation = operand.producer()
    if activation is None or not used_once(operand):
        return None
    inner, extra = activation.inputs[0], list[ir.Node]()
    if is_op(activation, "Mul"):
        gate = activation.inputs[1].producer() if activation.inputs[1] is not None else None
        if gate is None or not is_op(gate, "Sigmoid") or gate.inputs[0] is not inner or not used_once(gate.outputs[0]):
            return None
        extra = [gate]
    elif not is_op(activation, *ACTIVATIONS) or is_op(activation, "PRelu"):
        return None
    readers = 2 if extra else 1
    found = _linear(inner, readers)
    if found is None:
        return None
    x, in_map, bias_in, in_nodes = found
    nodes = (*out_nodes, activation, *extra, *in_nodes)
    return _Branch(x, in_map, bias_in, activation, out_map, bias_out, nodes)


def _linear(
    value: ir.Value | None, readers: int = 1
) -> tuple[ir.Value, linear_map.LinearMap, Array | None, tuple[ir.Node, ...]] | None:
    """`value` = x W (+ b), read `readers` times: x, the map, the bias and the nodes."""
    node = value.producer() if value is not None else None
    if value is None or node is None or value.is_graph_output() or len(value.uses()) != readers:
        return None
    bias, nodes = None, [node]
    if is_op(node, "Add"):
        bias = constant(node.inputs[1])
        product = node.inputs[0].producer() if node.inputs[0] is not None else None
        if bias is None or bias.ndim != 1 or product is None or not used_once(product.outputs[0]):
            return None
        nodes, node = [node, product], product
    if not is_op(node, "MatMul") or node.inputs[0] is None or shape_of(node.inputs[0]) is None:
        return None
    linear = linear_map.read(node)
    if isinstance(linear, str) or (bias is not None and bias.shape[0] != linear.output_channels()):
        return None
    return node.inputs[0], linear, None if bias is None else bias.astype(np.float64), tuple(nodes)
