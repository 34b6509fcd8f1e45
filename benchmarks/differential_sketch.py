"""A random ONNX graph while it is being drawn: values with their dims, and operators in the form of the graph's opset.

Motifs (`differential_motifs` and its siblings) draw on a `Sketch`. They say what they mean; where attributes or inputs
of an operator depend on the opset, the sketch knows (`reduce`, `squeeze`, `split`, ...). Numbers that a motif writes
down come back as constants in a random form: rank 0 or 1, as many axes as the operand or one more, an initializer, a
Constant node, or an initializer that the caller may override.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32, F64, F16, BF16 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16
I32, I64, U8, I8, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL
FLOATS = (F32, F64, F16, BF16)
Dim = int | str | None
Array = Any
Fill = Callable[[np.random.Generator, tuple[int, ...]], Array]
_FLAT_NAMES = ("", "/layers.0/", "model.", "a b ", "é", "x:0/")


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: dims are sizes, names of dynamic sizes, or None where nothing is known."""

    name: str
    dtype: int
    dims: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.dims)

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a floating-point one."""
        return self.dtype in FLOATS

    @property
    def last(self) -> int:
        """Size of the last axis where it is static, else 0."""
        return self.dims[-1] if self.dims and isinstance(self.dims[-1], int) else 0

    @property
    def static(self) -> bool:
        """Whether every size is known."""
        return all(isinstance(dim, int) for dim in self.dims)


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Dims of an elementwise result."""
    rank = max(map(len, shapes))
    out: list[Dim] = []
    for column in zip(*[(1,) * (rank - len(s)) + tuple(s) for s in shapes], strict=True):
        wide = [d for d in column if d != 1]
        sizes = [d for d in wide if isinstance(d, int)]
        out.append(1 if not wide else sizes[0] if sizes else wide[0] if len(set(wide)) == 1 else None)
    return tuple(out)


@dataclass
class Sketch:
    """One graph under construction.

    Attributes:
        opset: Version of the standard operators.
        dtype: The floating-point type of the graph.
        inputs: Name to (value, how to fill it).
        defaults: Inputs with an initializer: the feeds may leave them out.
        live: Values that later motifs may read.
        used: Names of the motifs drawn so far.
        masked: Whether a mask may leave a row without an open key: documented to give NaN or zeros.
    """

    rng: np.random.Generator
    opset: int
    dtype: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, tuple[Value, Fill]] = field(default_factory=dict)
    defaults: set[str] = field(default_factory=set)
    live: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    kind: str = "graph"
    counter: int = 0
    prefix: str = ""

    def __post_init__(self) -> None:
        self.prefix = self.pick(*_FLAT_NAMES) if self.chance(0.3) else ""

    # chance

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return bool(self.rng.random() < p)

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def near(self, usual: Any, *others: Any, p: float = 0.12) -> Any:
        """`usual`, or now and then one of the others: what makes a near miss of a motif."""
        return self.pick(*others) if self.chance(p) else usual

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's form of the graph's float type."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.dtype))

    # values

    def fresh(self, base: str) -> str:
        """A name that is not taken yet."""
        self.counter += 1
        return f"{self.prefix}{base}_{self.counter}"

    def input(self, dtype: int, dims: Sequence[Dim], fill: Fill, base: str = "x") -> Value:
        """A new input of the graph."""
        value = Value(self.fresh(base), dtype, tuple(dims))
        self.inputs[value.name] = (value, fill)
        return value

    def const(self, array: Array, base: str = "c") -> Value:
        """A constant in a random form."""
        array = np.asarray(array)
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        value = Value(self.fresh(base), dtype, tuple(int(d) for d in array.shape))
        roll = self.rng.random()
        if self.kind == "function" or roll < 0.2:
            self.nodes.append(
                helper.make_node("Constant", [], [value.name], value=numpy_helper.from_array(array, value.name))
            )
            return value
        if roll < 0.26 and array.size:
            for name, other in self.initializers.items():  # one tensor for several readers
                if other.dtype == array.dtype and np.array_equal(other, array) and name not in self.defaults:
                    return Value(name, dtype, value.dims)
        self.initializers[value.name] = array
        if roll > 0.985 and self.kind == "graph" and array.dtype.kind == "f":
            self.inputs[value.name] = (value, lambda rng, shape: rng.standard_normal(shape))
            self.defaults.add(value.name)
        return value

    def weight(self, *shape: int, scale: float | None = None) -> Value:
        """Random weights that keep the size of what they multiply."""
        fan = max(1, int(np.prod(shape[:-1])) if len(shape) == 2 else int(np.prod(shape[1:])))
        factor = 1 / np.sqrt(fan) if scale is None else scale
        return self.const((self.rng.standard_normal(shape) * factor).astype(self.numpy), "w")

    def vector(self, n: int, *, around: float = 0.0) -> Value:
        """Random numbers [n] around a mean."""
        return self.const((around + 0.3 * self.rng.standard_normal(n)).astype(self.numpy), "b")

    def ints(self, values: Any) -> Value:
        """A constant of int64."""
        return self.const(np.asarray(values, np.int64), "i")

    def literal(self, number: float, like: Value) -> Value:
        """A number as an operand beside `like`, of a random rank; now and then of one axis more than `like` has."""
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(like.dtype))
        rank = self.pick(0, 0, 0, 0, 0, 1, 1, like.rank, like.rank + 1 if self.chance(0.25) else 0)
        return self.const(np.full((1,) * rank, number).astype(kind), "k")

    # operators

    def op(
        self,
        kind: str,
        *operands: Value | float | None,
        dims: Sequence[Dim] | None = None,
        dtype: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """An operator with one output. Numbers become literals; dims default to the broadcast operands."""
        return self.ops(kind, operands, [dims], [dtype], domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        operands: Sequence[Value | float | None],
        dims: Sequence[Sequence[Dim] | None],
        dtypes: Sequence[int | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """An operator with several outputs."""
        first = next(v for v in operands if isinstance(v, Value)) if operands else None
        given = [self.literal(v, first) if isinstance(v, int | float) and first else v for v in operands]
        values = [v for v in given if isinstance(v, Value)]
        out: list[Value] = []
        for shape, dtype in zip(dims, dtypes, strict=True):
            shape = broadcast(*[v.dims for v in values]) if shape is None else tuple(shape)
            out.append(Value(self.fresh(kind.lower()), values[0].dtype if dtype is None else dtype, shape))
        names = [v.name if isinstance(v, Value) else "" for v in given]
        while names and not names[-1]:
            names.pop()
        title = self.pick("", f"n{self.counter}") if self.chance(0.3) else f"/{kind}_{self.counter}"
        attributes = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(kind, names, [v.name for v in out], name=title, domain=domain, **attributes))
        return out

    def add(self, a: Value, b: Value | float) -> Value:
        """a + b in either order."""
        return self.either("Add", a, b)

    def mul(self, a: Value, b: Value | float) -> Value:
        """a * b in either order; by a number now and then as a quotient."""
        if isinstance(b, int | float) and b and self.chance(0.15):
            return self.op("Div", a, 1.0 / b)
        return self.either("Mul", a, b)

    def either(self, kind: str, a: Value, b: Value | float) -> Value:
        """A commutative operator with its operands in either order."""
        b = b if isinstance(b, Value) else self.literal(b, a)
        return self.op(kind, a, b) if self.chance(0.6) else self.op(kind, b, a)

    def cast(self, x: Value, dtype: int) -> Value:
        """Cast."""
        return self.op("Cast", x, dims=x.dims, dtype=dtype, to=dtype)

    def reduce(self, kind: str, x: Value, axes: Sequence[int] | None, keep: int = 1) -> Value:
        """A reduction, its axes as an attribute or an input as the opset wants; None for all axes."""
        rank = x.rank
        hit = set(range(rank)) if axes is None else {a % rank for a in axes}
        dims = [1 if i in hit else d for i, d in enumerate(x.dims) if keep or i not in hit]
        by_input = self.opset >= (13 if kind == "ReduceSum" else 18)
        attributes = {} if keep and self.chance(0.3) else {"keepdims": keep}
        if axes is None:
            return self.op(kind, x, dims=dims, **attributes)
        written = [a - rank if self.chance(0.4) and a >= 0 else a for a in axes]
        if by_input:
            return self.op(kind, x, self.ints(written), dims=dims, **attributes)
        return self.op(kind, x, dims=dims, axes=list(written), **attributes)

    def squeeze(self, x: Value, axes: Sequence[int]) -> Value:
        """Squeeze."""
        gone = {a % x.rank for a in axes}
        dims = [d for i, d in enumerate(x.dims) if i not in gone]
        if self.opset >= 13:
            return self.op("Squeeze", x, self.ints(axes), dims=dims)
        return self.op("Squeeze", x, dims=dims, axes=list(axes))

    def unsqueeze(self, x: Value, axes: Sequence[int]) -> Value:
        """Unsqueeze."""
        rank = x.rank + len(axes)
        new, rest = {a % rank for a in axes}, iter(x.dims)
        dims = [1 if i in new else next(rest) for i in range(rank)]
        if self.opset >= 13:
            return self.op("Unsqueeze", x, self.ints(axes), dims=dims)
        return self.op("Unsqueeze", x, dims=dims, axes=list(axes))

    def split(self, x: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
        """Split into parts of these sizes."""
        shapes = [[size if i == axis % x.rank else d for i, d in enumerate(x.dims)] for size in sizes]
        if self.opset >= 13:
            return self.ops("Split", [x, self.ints(sizes)], shapes, [None] * len(sizes), axis=axis)
        return self.ops("Split", [x], shapes, [None] * len(sizes), axis=axis, split=list(sizes))

    def slice(self, x: Value, axis: int, start: int, end: int, step: int = 1, size: Dim = None) -> Value:
        """x[start:end:step] along an axis; `size` is what is left of it where the axis is dynamic."""
        whole = x.dims[axis % x.rank]
        left = len(range(*slice(start, end, step).indices(whole))) if isinstance(whole, int) else size
        dims = [left if i == axis % x.rank else d for i, d in enumerate(x.dims)]
        operands = [x, self.ints([start]), self.ints([end]), self.ints([axis])]
        return self.op("Slice", *operands, self.ints([step]) if step != 1 or self.chance(0.2) else None, dims=dims)

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """Transpose."""
        return self.op("Transpose", x, dims=[x.dims[p] for p in perm], perm=list(perm))

    def reshape(self, x: Value, target: Sequence[int], dims: Sequence[Dim]) -> Value:
        """Reshape to constant numbers; `dims` is what comes out."""
        return self.op("Reshape", x, self.ints(list(target)), dims=dims)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Concat."""
        sizes = [v.dims[axis] for v in values]
        total = sum(sizes) if all(isinstance(d, int) for d in sizes) else None  # type: ignore[arg-type]
        axis_ = axis % values[0].rank
        dims = [total if i == axis_ else d for i, d in enumerate(values[0].dims)]
        return self.op("Concat", *values, dims=dims, axis=axis)

    def softmax(self, x: Value, axis: int, kind: str = "Softmax") -> Value:
        """Softmax; below opset 13 it flattens, so that only the last axis means the same."""
        return self.op(kind, x, dims=x.dims, axis=axis)

    def matmul(self, a: Value, b: Value) -> Value:
        """MatMul of two values of rank 2 or more."""
        lead = broadcast(a.dims[:-2], b.dims[:-2]) if a.rank > 2 or b.rank > 2 else ()
        return self.op("MatMul", a, b, dims=(*lead, a.dims[-2], b.dims[-1]))

    def clip(self, x: Value, low: float | None, high: float | None) -> Value:
        """Clip with scalar bounds."""
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(x.dtype))
        bounds = [None if b is None else self.const(np.asarray(b).astype(kind)) for b in (low, high)]
        return self.op("Clip", x, *bounds, dims=x.dims)

    @contextmanager
    def inside(self, kind: str) -> Iterator[list[onnx.NodeProto]]:
        """Draw into a list of nodes of its own: the body of a branch, a loop or a function."""
        outer, outer_kind = self.nodes, self.kind
        body: list[onnx.NodeProto] = []
        self.nodes, self.kind = body, kind if outer_kind != "function" else outer_kind
        try:
            yield body
        finally:
            self.nodes, self.kind = outer, outer_kind


def info(value: Value) -> onnx.ValueInfoProto:
    """The declaration of a value."""
    return helper.make_tensor_value_info(value.name, value.dtype, list(value.dims))
