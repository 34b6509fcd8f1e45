"""Products of one input as one product with the weights side by side, and a Split.

    x W_1 + b_1, x W_2 + b_2, ...  =  Split(x [W_1 W_2 ...] + [b_1 b_2 ...])

Rules
1. `pack`: all products of one value with constant matrices of one type: the gate and the values of a GLU (Shazeer, "GLU
   Variants Improve Transformer", arXiv 2002.05202), queries, keys and values, also of grouped heads. Biases are packed
   if every product has one that nothing else reads; otherwise each stays where it is.
Left alone: a single product; weights that another operator reads, which would then be kept twice. Where it does not
pay, a remark says so: on the CPU no size was found where it does (docs/onnxruntime-notes.md), so `largest_rows` is 0.
Attention on ONNX Runtime takes its projections in on its own (`xform.backends.onnxruntime.attention_packed`), and for
GPUs products are packed where they run, by the clock (`xform.backends.torch_triton.packing`).

The pass is exact, up to the order in which a runtime sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, constant, constant_tensor, is_op, rank_of, shape_of, used_once
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule


@dataclass(frozen=True)
class Pack(Rule):
    """Rule 1."""

    name = "pack"
    concept = "linear"

    largest_rows: int

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "MatMul")})

    def reach(self) -> int:
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        x = node.inputs[0]
        products = [] if x is None else _products(x, node)
        if len(products) > 1 and products[0] is node:
            biases = [_bias(product) for product in products]
            sums = [add.outputs[0] for add, _ in (b for b in biases if b is not None)]
            packed = len(sums) == len(products)
            roots = tuple(sums if packed else [product.outputs[0] for product in products])
            yield Match(
                roots=roots, interior=tuple(products), data={"products": products, "biases": biases if packed else []}
            )

    def check(self, match: Match, context: PassContext) -> Failure | None:
        products: list[ir.Node] = match.data["products"]
        weights = [product.inputs[1] for product in products]
        shared = [p for p, w in zip(products, weights, strict=True) if w is not None and len(w.uses()) > 1]
        return Failure("a weight is read elsewhere too and would be kept twice", tuple(shared)) if shared else None

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """Pays where starting a product costs more than the Split: cost ~ launches * t0 against M N bytes moved.

        Rows M of x up to `largest_rows` are packed. On the CPU t0 is below 2 us, and nothing is gained from 1 row on.
        """
        products: list[ir.Node] = match.data["products"]
        shape = shape_of(products[0].inputs[0]) or (None,)
        sizes = [dim for dim in shape[:-1] if isinstance(dim, int)]
        if len(sizes) == len(shape) - 1 and prod(sizes) <= self.largest_rows:
            return None
        measured = f"{len(products)} products share their input; one with a Split was measured no faster on CPUs"
        if not self.largest_rows:
            return Failure(f"{measured}, for any number of rows", tuple(products))
        rows = str(prod(sizes)) if len(sizes) == len(shape) - 1 else "an unknown number of"
        return Failure(f"{measured} above {self.largest_rows} rows; these have {rows}", tuple(products))

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        products: list[ir.Node] = match.data["products"]
        weights = [_array(product.inputs[1]) for product in products]
        name = products[0].inputs[1].name if products[0].inputs[1] is not None else None
        joint = build.op("MatMul", products[0].inputs[0], build.constant(np.concatenate(weights, 1), f"{name}_packed"))
        if match.data["biases"]:
            offsets = np.concatenate([bias for _, bias in match.data["biases"]])
            joint = build.op("Add", joint, build.constant(offsets, f"{name}_packed_bias"))
        sizes = np.array([weight.shape[1] for weight in weights], np.int64)
        return build.ops("Split", [joint, build.constant(sizes, "split")], len(products), axis=-1)


def _products(x: ir.Value, node: ir.Node) -> list[ir.Node]:
    """The products of `x` with constant matrices of the type of the first, in the graph of `node`."""
    if (rank_of(x) or 0) < 2:
        return []
    found = []
    for user, index in x.uses():
        weight = constant_tensor(user.inputs[1]) if index == 0 and is_op(user, "MatMul") else None
        if weight is not None and len(weight.shape) == 2 and user.graph is node.graph:
            found.append((user, weight.dtype))
    return [user for user, dtype in found if dtype is found[0][1]]


def _bias(product: ir.Node) -> tuple[ir.Node, Array] | None:
    """The Add of a constant vector that alone reads `product`, with the vector."""
    output = product.outputs[0]
    user = next(iter(output.uses())).node if used_once(output) else None
    if user is None or not is_op(user, "Add") or user.graph is not product.graph:
        return None
    bias = next((constant(v) for v in user.inputs if v is not output and constant(v) is not None), None)
    width = (shape_of(output) or (None,))[-1]
    if bias is None or bias.size != width or bias.shape[-1] != width or bias.ndim > (rank_of(output) or 0):
        return None
    return user, bias.reshape(-1)


def _array(value: ir.Value | None) -> Array:
    array = constant(value)
    if array is None:
        raise ValueError("a weight that was constant is no more")
    return array


@dataclass(frozen=True)
class PackProducts(RewritePass):
    """Products of one input as one, where that is faster.

    Attributes:
        largest_rows: Most rows of the input that are packed; 0 packs nothing and says so.
    """

    name: ClassVar[str] = "pack_products"
    largest_rows: int = 0

    def rules(self) -> Sequence[Rule]:
        return (Pack(self.largest_rows),)
