"""Building new nodes during a rewrite, each with types, shapes, provenance and a name that nothing else has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.kernels import computing_type
from xform.graph.reshape import constant_target
from xform.graph.rounding import narrowed, rounding_loss
from xform.graph.shapes import infer_node
from xform.graph.values import ORIGIN, Array, Dim, Held, shape_of

Input = ir.Value | Array | float | int | bool | Sequence[int] | None

PASS = "xform.pass"
RULE = "xform.rule"

_LOSSLESS = 1e-11  # relative, among float64 operands


class UnknownRankError(Exception):
    """A replacement cannot be written, because the rank or the dtype of one of its operands is not known."""


class Builder:
    """Collects the nodes and initializers of one rewrite; the rewriter inserts them.

    Attributes:
        nodes, initializers: What was built, in order.
        lossy: Numbers that were not kept: attributes that float32, the type of every float attribute, cannot hold as
            precisely as the operands of their node need it, and folded constants that their dtype cannot hold. The
            rewriter refuses such a replacement.

    Args:
        opsets: Opset imports of the graph; a new domain is added at version 1.
        unique: Gives an unused name from a base name.
        origin: Names of the source nodes, recorded on every new node.
    """

    def __init__(
        self, opsets: dict[str, int], unique: Callable[[str], str], origin: str, pass_name: str, rule: str
    ) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.lossy: list[str] = []
        self._opsets = opsets
        self._unique = unique
        self._metadata = {ORIGIN: origin, PASS: pass_name, RULE: rule}

    def op(self, op_type: str, *inputs: Input, domain: str = "", **attributes: Any) -> ir.Value:
        """A new node with one output; returns the output. See `ops`."""
        return self.ops(op_type, inputs, 1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[Input], outputs: int, *, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """A new node with several outputs; returns them.

        Args:
            inputs: Values; arrays become initializers; numbers become rank-0 initializers of the first value's
                dtype; sequences of ints become int64 initializers; None omits an optional input.
            attributes: Python values; None leaves the attribute out.

        Raises:
            UnknownRankError: There is a number, and the value whose dtype it takes has none that is known.
        """
        like = next((i.dtype for i in inputs if isinstance(i, ir.Value)), None)
        untyped = next((i for i in inputs if isinstance(i, ir.Value)), None)
        if like is None and untyped is not None and any(isinstance(i, bool | int | float) for i in inputs):
            raise UnknownRankError(f"the dtype of {untyped.name or 'a value'} is not known")
        values = [self._input(i, like) for i in inputs]
        while values and values[-1] is None:
            values.pop()
        plain = {k: float(v) if isinstance(v, Held) else v for k, v in attributes.items() if v is not None}
        attrs = ir.convenience.convert_attributes(plain)
        node = ir.Node(domain, op_type, values, attrs, num_outputs=outputs, name=self._unique(f"xform_{op_type}"))
        for output in node.outputs:
            output.name = self._unique(f"{node.name}_out")
        node.metadata_props.update(self._metadata)
        self.lossy.extend(
            f"{name} = {value!r} of {op_type} is not exact as an attribute, which is float32"
            for name, value in attributes.items()
            if isinstance(value, float) and not isinstance(value, Held) and not _survives(value, computing_type(node))
        )
        self._opsets.setdefault(domain, 1)
        infer_node(node, self._opsets[domain])
        self.nodes.append(node)
        return node.outputs

    def reshape(self, x: ir.Value, *sizes: int | slice | tuple[slice, int]) -> ir.Value:
        """A Reshape that also holds where a named dim of `x` is 0 (`xform.graph.reshape`).

        Args:
            sizes: One entry per new axis: a number; the axes of `x` whose sizes are multiplied, as a slice; or such a
                slice and a number that divides the product.

        Raises:
            UnknownRankError: The rewriter takes it for a refusal.
        """
        shape = shape_of(x)
        if shape is None:
            raise UnknownRankError(f"the rank of {x.name or 'a value'} is not known")
        wanted = [_wanted(size, shape) for size in sizes]
        target = constant_target(wanted, shape)
        if target is not None:
            return self.op("Reshape", x, target)
        parts = [
            [known] if isinstance(known, int) else self._merged_size(x, size, len(shape))
            for size, known in zip(sizes, wanted, strict=True)
        ]
        result = self.op("Reshape", x, self.op("Concat", *parts, axis=0), allowzero=1)
        result.shape = ir.Shape(wanted)
        return result

    def _merged_size(self, x: ir.Value, size: int | slice | tuple[slice, int], rank: int) -> ir.Value:
        axes, divisor = size if isinstance(size, tuple) else (size, 1)
        assert isinstance(axes, slice)  # numbers are known
        start, end, _ = axes.indices(rank)
        sizes = self.op("Shape", x, start=start, end=end)
        product = sizes if end - start == 1 else self.op("ReduceProd", sizes, keepdims=1)
        return product if divisor == 1 else self.op("Div", product, [divisor])

    def constant(self, array: Array | ir.TensorProtocol, name: str = "constant") -> ir.Value:
        """A new initializer. `name` is a base; a suffix is added where it is taken."""
        tensor = ir.tensor(array) if isinstance(array, np.ndarray | np.generic) else array
        unique = self._unique(name)
        if isinstance(tensor, ir.Tensor):
            tensor.name = unique
        value = ir.Value(
            name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.initializers.append(value)
        return value

    def discard(self) -> None:
        """Let go of what was built, so that its operands do not count it among their readers."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        self.nodes.clear()
        self.lossy.clear()
        self.initializers.clear()

    def folded(self, array: Array, dtype: ir.DataType, name: str, *, summand: bool = False) -> ir.Value:
        """A new initializer from numbers in float64, rounded once to `dtype`.

        Where that destroys more than it rounds (`xform.graph.rounding`), the rewriter refuses the replacement.
        """
        loss = rounding_loss(array, dtype, summand=summand)
        if loss is not None:
            self.lossy.append(f"the folded constant {name} {loss}")
        return self.constant(narrowed(array, dtype), name)

    def _input(self, given: Input, like: ir.DataType | None) -> ir.Value | None:
        if given is None or isinstance(given, ir.Value):
            return given
        if isinstance(given, np.ndarray | np.generic):
            return self.constant(np.asarray(given))
        if isinstance(given, bool | int | float):
            if like is None:
                raise TypeError("a bare number needs another input to take its dtype from")
            loss = rounding_loss(np.asarray(given, np.float64), like, summand=True) if np.isfinite(given) else None
            if loss is not None:
                self.lossy.append(f"the number {given:g} {loss}")
            with np.errstate(over="ignore"):
                return self.constant(np.asarray(given, dtype=like.numpy()))
        return self.constant(np.asarray(given, dtype=np.int64))


def _wanted(size: int | slice | tuple[slice, int], shape: Sequence[Dim]) -> Dim:
    if isinstance(size, int):
        return size
    if isinstance(size, slice):
        return _merged_dim(shape[size])
    merged = _merged_dim(shape[size[0]])
    return merged // size[1] if isinstance(merged, int) else None


def _merged_dim(dims: Sequence[Dim]) -> Dim:
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(numbers) if len(numbers) == len(dims) else dims[0] if len(dims) == 1 else None


def _survives(number: float, dtype: ir.DataType | None) -> bool:
    """Whether a float attribute is as good as `number` for a node that computes in `dtype`."""
    with np.errstate(over="ignore", under="ignore"):
        kept = float(np.float32(number))
    tolerance = _LOSSLESS if dtype is ir.DataType.DOUBLE else 2.0**-23
    return kept == number or (math.isfinite(kept) and abs(kept - number) <= tolerance * abs(number))
