"""Parallel branches around a nonlinearity as one wider one: feed-forward layers here, attention in `join_attention`.

    U1 f(W1 x + b1) + U2 f(W2 x + b2) = [U1 U2] f([W1; W2] x + [b1; b2])

for any f that treats elements alone, the same in both. The work is the same, in half as many products of twice the
width, and one Add goes away. Branches that are summed before f need no widening: that sum is linear, and
`merge_affine_maps` merges it, as it merges U1 h + U2 h. Two branches whose sums would have to move through f
(f(a) + f(b) is not f(a + b)) stay as wide as they are. Source: "Rethinking Vision Transformer Depth via Structural
Reparameterization", arXiv 2511.19718, which joins branches at the inputs of the nonlinearities.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attributes_of, constant, is_constant, is_op, shape_of, used_once
from xform.passes.reparameterize import linear_map
from xform.passes.reparameterize.linear_map import LinearMap
from xform.patterns.adapter import ACTIVATIONS
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule

_MAX_SUMMANDS = 16


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
    into: LinearMap
    bias_in: Array | None
    activation: ir.Node
    out: LinearMap
    bias_out: Array | None
    nodes: tuple[ir.Node, ...]


class JoinBranches(Rule):
    """Two summands of one sum as one wider branch; what the branches are, subclasses say."""

    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "Add")})

    def reach(self) -> int:
        return 10

    @abstractmethod
    def read(self, value: ir.Value) -> Any | None:
        """The branch that ends in `value`, with its nodes in `nodes`; None if it is none."""

    @abstractmethod
    def difference(self, first: Any, second: Any) -> str | None:
        """Why two branches are no one wider branch; empty where they have nothing to do with each other."""

    @abstractmethod
    def join(self, first: Any, second: Any, build: Builder) -> ir.Value:
        """The wider branch."""

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        leaves, interior = summands(node)
        branches = [(leaf, branch) for leaf in leaves if (branch := self.read(leaf)) is not None]
        for (left, first), (right, second) in itertools.combinations(branches, 2):
            reason = self.difference(first, second)
            if reason is None:
                rest = [leaf for leaf in leaves if leaf is not left and leaf is not right]
                everything = [*interior, *first.nodes, *second.nodes]
                data = {"branches": (first, second), "rest": rest}
                yield Match(nodes=dict(enumerate(everything)), roots=(node.outputs[0],), data=data)
            elif reason:
                yield Failure(reason, (node, first.nodes[0], second.nodes[0]))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        first, second = match.data["branches"]
        value = self.join(first, second, build)
        for other in match.data["rest"]:
            value = build.op("Add", other, value)
        return value


def summands(node: ir.Node) -> tuple[list[ir.Value], list[ir.Node]]:
    """The values that a tree of Adds, each read by the next alone, adds up, and its nodes; biases are no summands."""
    leaves: list[ir.Value] = []
    interior: list[ir.Node] = [node]
    stack = [v for v in reversed(node.inputs) if v is not None]
    while stack and len(interior) < _MAX_SUMMANDS:
        value = stack.pop()
        maker = value.producer()
        inner = [v for v in maker.inputs if v is not None] if maker is not None and is_op(maker, "Add") else []
        same = len(inner) == 2 and all(not is_constant(v) and shape_of(v) == shape_of(value) for v in inner)
        if maker is not None and same and used_once(value) and maker.graph is node.graph:
            interior.append(maker)
            stack.extend(reversed(inner))
        else:
            leaves.append(value)
    return [*leaves, *stack], interior


class WidenFeedForward(JoinBranches):
    """Two parallel feed-forward branches over the same value."""

    name = "widen_feed_forward"

    def read(self, value: ir.Value) -> _Branch | None:
        return _branch(value)

    def difference(self, first: _Branch, second: _Branch) -> str | None:
        if first.x is not second.x or first.activation is second.activation:
            return ""
        return _difference(first, second)

    def join(self, first: _Branch, second: _Branch, build: Builder) -> ir.Value:
        hidden = joined_linear(first.into, second.into, first.bias_in, second.bias_in, first.x, build)
        if is_op(first.activation, "Mul"):
            active = build.op("Mul", hidden, build.op("Sigmoid", hidden))
        else:
            attributes = attributes_of(first.activation)
            active = build.op(first.activation.op_type, hidden, *first.activation.inputs[1:], **attributes)
        return stacked_linear(first.out, second.out, first.bias_out, second.bias_out, active, build)


def joined_linear(
    a: LinearMap, b: LinearMap, bias_a: Array | None, bias_b: Array | None, x: ir.Value, build: Builder
) -> ir.Value:
    """[A(x), B(x)] over the last axis."""
    weight = np.concatenate([a.weight, b.weight], axis=1)
    value = build.op("MatMul", x, build.folded(weight, a.dtype, "joined"))
    if bias_a is None and bias_b is None:
        return value
    both = np.concatenate([_bias(bias_a, a), _bias(bias_b, b)])
    return build.op("Add", value, build.folded(both, a.dtype, "joined_bias", summand=True))


def stacked_linear(
    a: LinearMap, b: LinearMap, bias_a: Array | None, bias_b: Array | None, x: ir.Value, build: Builder
) -> ir.Value:
    """A(x1) + B(x2) for x = [x1, x2] over the last axis."""
    weight = np.concatenate([a.weight, b.weight], axis=0)
    value = build.op("MatMul", x, build.folded(weight, a.dtype, "stacked"))
    if bias_a is None and bias_b is None:
        return value
    total = _bias(bias_a, a) + _bias(bias_b, b)
    return build.op("Add", value, build.folded(total, a.dtype, "stacked_bias", summand=True))


def _bias(bias: Array | None, linear: LinearMap) -> Array:
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
    out = linear_behind(value)
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
    found = linear_behind(inner, readers)
    if found is None:
        return None
    x, in_map, bias_in, in_nodes = found
    nodes = (*out_nodes, activation, *extra, *in_nodes)
    return _Branch(x, in_map, bias_in, activation, out_map, bias_out, nodes)


def linear_behind(
    value: ir.Value | None, readers: int = 1
) -> tuple[ir.Value, LinearMap, Array | None, tuple[ir.Node, ...]] | None:
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
