"""Block-diagonal products as one dense product, where that is no costlier.

A chain of views, products with constants and arithmetic per channel that acts on every token alone is x D + c
(`xform.patterns.block_linear` proves it axis by axis and computes D and c in float64). BlockDense, BlockShuffle and
their kin are such chains around batched products: many small operators, reshapes and transposes. "Pre-merging" them
into D is described by Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured
Feedforward Layers", 2024; it pays where D is no larger than its factors, and always removes the data movement.

Rules
1. The chain through a batched product becomes MatMul(x, D) [, Add(., c)], between Reshapes where x or the result have
   their channels on several axes. Chains may start and end at any value; the cheapest is taken. So a block-diagonal
   product next to a dense one merges into that, even where D alone would be costlier.
2. Profit, with T tokens (unknown dims count as 1), K channels in and N out:

       dense   2 T K N + K N, and T N + N with a shift
       chain   FLOPs and parameters of its nodes (`xform.graph.count`); weights that others read count nothing

   The dense form is taken where it costs no more: it then has fewer nodes as well.
Left alone, with a remark that has both figures: costlier ones. Left alone in silence: products that mix tokens or
differ from token to token, values in between that something else reads, weights that are no floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.count import count_node
from xform.graph.reshape import constant_target
from xform.graph.rounding import folding_loss
from xform.graph.values import Array, Dim, constant_tensor, is_op, shape_of, used_once
from xform.patterns.block_linear import PRODUCTS, VIEWS, Trace, data_operand, is_batched
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.remarks import Cost
from xform.rewrite.rule import Failure, Rule

MAX_STEPS = 16  # in either direction from the batched product
MAX_CHANNEL_AXES = 3


@dataclass(frozen=True)
class _Chain:
    """Steps from x to the value that is replaced.

    Attributes:
        nodes: In the order of the data flow.
        x: The operand.
        channel_axes: How many of its last axes are its channels.
        before, after: FLOPs and parameters of the nodes, and of the dense form.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    channel_axes: int
    before: int
    after: int

    @property
    def root(self) -> ir.Value:
        """The value that is replaced."""
        return self.nodes[-1].outputs[0]


class Densify(Rule):
    """Rules 1 and 2, at each batched product."""

    name = "densify"
    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset(("", op_type) for op_type in PRODUCTS)

    def reach(self) -> int:
        return 4

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if not is_batched(node):
            return
        path, at = _path(node)
        chains = [chain for start in range(at + 1) for chain in _chains(path, start, at)]
        if not chains:
            return
        best = min(chains, key=lambda chain: (chain.after - chain.before, -len(chain.nodes)))
        if best.after <= best.before:
            yield _match(best)
        elif node is _first_batched(best.nodes):  # one remark for a chain with several
            products = tuple(n for n in best.nodes if is_op(n, *PRODUCTS))
            yield Failure(
                f"one dense matrix would cost {best.after:,} FLOPs and parameters, the blocks cost {best.before:,}",
                products,
            )

    def rewrite(self, match: Match, build: Builder) -> ir.Value | Failure:
        chain: _Chain = match.data["chain"]
        trace = Trace.start(chain.x, chain.channel_axes, numeric=True)
        assert trace is not None
        for node in chain.nodes:
            refused = trace.step(node)
            assert refused is None  # as without numbers
        matrix, shift = trace.dense()
        dtype = chain.x.dtype
        loss = "is of unknown type" if dtype is None else folding_loss(matrix, shift, dtype)
        if dtype is None or loss is not None:
            return Failure(f"the dense matrix {loss}", chain.nodes)
        return _build(chain, matrix, shift if _shifts(chain.nodes) else None, dtype, build)


@dataclass(frozen=True)
class RaiseBlockLinear(RewritePass):
    """Make one dense product of block-diagonal ones, where that is no costlier."""

    name = "raise_block_linear"

    def rules(self) -> tuple[Rule, ...]:
        return (Densify(),)


def _path(node: ir.Node) -> tuple[list[ir.Node], int]:
    """The longest run of steps through `node` whose values in between nothing else reads, and where `node` stands."""
    path, current = [node], node
    while len(path) <= MAX_STEPS:
        operand = current.inputs[data_operand(current) or 0]
        maker = operand.producer() if operand is not None else None
        if operand is None or maker is None or maker.graph is not node.graph or not used_once(operand):
            break
        if data_operand(maker) is None:
            break
        path.insert(0, maker)
        current = maker
    at, current = len(path) - 1, node
    while len(path) - at <= MAX_STEPS and used_once(current.outputs[0]):
        reader = next(iter(current.outputs[0].uses())).node
        side = data_operand(reader)
        if side is None or reader.inputs[side] is not current.outputs[0] or reader.graph is not node.graph:
            break
        path.append(reader)
        current = reader
    return path, at


def _chains(path: list[ir.Node], start: int, at: int) -> Iterator[_Chain]:
    """The chains from the operand of path[start] through path[at] that are linear maps of tokens."""
    x = path[start].inputs[data_operand(path[start]) or 0]
    if x is None or x.dtype is None or not x.dtype.is_floating_point():
        return
    for channel_axes in range(1, MAX_CHANNEL_AXES + 1):
        trace = Trace.start(x, channel_axes, numeric=False)
        if trace is None:
            return
        channels = trace.size()
        for index, node in enumerate(path[start:], start):
            if trace.step(node) is not None:
                break
            outputs = trace.closed() if index >= at else None
            if outputs is not None:
                nodes = tuple(path[start : index + 1])
                after = _dense_cost(x, channel_axes, channels, outputs, _shifts(nodes))
                chain = _Chain(nodes, x, channel_axes, _chain_cost(nodes), after)
                if _shapes(chain, outputs) is not None:
                    yield chain


def _first_batched(nodes: tuple[ir.Node, ...]) -> ir.Node:
    return next(node for node in nodes if is_batched(node))


def _shifts(nodes: tuple[ir.Node, ...]) -> bool:
    return any(is_op(node, "Add", "Sub") for node in nodes)


def _chain_cost(nodes: tuple[ir.Node, ...]) -> int:
    inside = set(nodes)
    total = 0
    for node in nodes:
        if is_op(node, *VIEWS, "Transpose"):
            continue
        counted = count_node(node)
        shared = sum(
            t.size
            for value in {v for v in node.inputs if v is not None}
            if (t := constant_tensor(value)) is not None and any(use.node not in inside for use in value.uses())
        )
        total += (counted.flops or 0) + counted.parameters - shared
    return total


def _dense_cost(x: ir.Value, channel_axes: int, channels: int, outputs: int, shifted: bool) -> int:
    tokens = 1
    for dim in (shape_of(x) or ())[:-channel_axes]:
        tokens *= dim if isinstance(dim, int) else 1
    return (2 * tokens + 1) * channels * outputs + (tokens * outputs + outputs if shifted else 0)


def _match(chain: _Chain) -> Match:
    before = Cost(sum(not is_op(n, *VIEWS) for n in chain.nodes), flops=chain.before)
    return Match(
        nodes=dict(enumerate(chain.nodes)),
        roots=(chain.root,),
        data={"chain": chain},
        cost_before=before,
        cost_after=Cost(1 + _shifts(chain.nodes), flops=chain.after),
    )


@dataclass(frozen=True)
class _Shapes:
    """Shape operands of the Reshapes around the dense product; None where none is needed."""

    x: list[int] | None
    result: list[int] | None


def _shapes(chain: _Chain, outputs: int) -> _Shapes | None:
    """None where the shape of the result cannot be told from that of x."""
    given, wanted = shape_of(chain.x), shape_of(chain.root)
    if given is None or wanted is None:
        return None
    tokens = given[: len(given) - chain.channel_axes]
    before = None if chain.channel_axes == 1 else [*([0] * len(tokens)), _product(given[len(tokens) :])]
    product: tuple[Dim, ...] = (*tokens, outputs)
    if product == wanted:
        return _Shapes(before, None)
    after = constant_target(wanted, product)
    return None if after is None else _Shapes(before, after)


def _product(sizes: tuple[Dim, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size if isinstance(size, int) else 1
    return total


def _build(chain: _Chain, matrix: Array, shift: Array | None, dtype: ir.DataType, build: Builder) -> ir.Value:
    shapes = _shapes(chain, matrix.shape[1])
    assert shapes is not None
    value = chain.x if shapes.x is None else build.op("Reshape", chain.x, shapes.x)
    batched = _first_batched(chain.nodes)
    source = batched.inputs[1 - (data_operand(batched) or 0)]
    name = source.name if source is not None and source.name else "weight"
    value = build.op("MatMul", value, build.folded(matrix, dtype, f"{name}_dense"))
    if shift is not None:
        value = build.op("Add", value, build.folded(shift, dtype, f"{name}_bias", summand=True))
    return value if shapes.result is None else build.op("Reshape", value, shapes.result)
