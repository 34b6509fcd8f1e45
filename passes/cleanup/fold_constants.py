"""Compute at compile time what depends on constants only.

Wraps onnxscript's FoldConstantsPass. What it may evaluate is decided here:
1. operators whose NumPy evaluation is the ONNX meaning to rounding (`_FOLDABLE`); nothing random, nothing quantized, no
   strings, no integer division of negatives (NumPy rounds down, ONNX toward zero), no float-to-integer casts of values
   that do not fit;
2. results of at most `output_limit` elements, and altogether no growth of the model beyond `growth_limit` bytes: a
   result no larger than the operands that die with it is always welcome;
3. operands of at most `input_limit` elements, so that large weights are not loaded. A transposed weight is the
   exception: it becomes a lazy tensor, computed when the model is written or run;
4. nothing that a graph output names.
GatherElements is computed here: onnx 1.23's own evaluation fails beyond 32 choices, and for some shapes takes the wrong
axis. It is how transformers looks up the token types of BERT.
Default values of inputs are no constants. Constant nodes become initializers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer import _constant_folding as onnxscript_folding

from xform.graph.shapes import infer_node
from xform.graph.values import ONNX_DOMAINS, Array, attribute, constant, constant_tensor, shape_of
from xform.passes.cleanup.library import LibraryPass

_FOLDABLE = frozenset(
    "Abs Add And ArgMax ArgMin BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Concat "  # noqa: SIM905
    "ConstantOfShape Cos CumSum Div Equal Exp Expand Flatten Floor Gather GatherND Greater "
    "GreaterOrEqual Identity Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg Not OneHot Or Pad Pow Range "
    "Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape ScatterElements ScatterND Shape "
    "Sigmoid Sign Sin Size Slice Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where Xor".split()
)
_NUMBERS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.BOOL}
    | {ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64}
    | {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
)


@dataclass(frozen=True)
class FoldConstants(LibraryPass):
    """Constant folding with bounds.

    Attributes:
        input_limit: Largest number of elements of an operand.
        output_limit: Largest number of elements of a result that is larger than its operands.
        growth_limit: Bytes by which the model may grow in one run.
    """

    name = "fold_constants"
    input_limit: int = 1 << 22
    output_limit: int = 1 << 18
    growth_limit: int = 1 << 25

    def apply(self, model: ir.Model) -> bool:
        transposed = self._transpose_lazily(model.graph)
        decide = _Decision(self, model.opset_imports.get("", 1))
        gathered = [_gather_elements(graph, decide) for graph in model.graphs()]
        fold = onnxscript_folding.FoldConstantsPass(
            shape_inference=False,
            input_size_limit=self.input_limit,
            output_size_limit=max(self.input_limit, self.output_limit),
            should_fold=decide,
        )
        with np.errstate(all="ignore"):  # ONNX has no warnings: the logarithm of 0 is -inf, which a Where may leave out
            folded = fold(model).modified
        lifted = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
        return bool(transposed or any(gathered) or folded or lifted)

    def _transpose_lazily(self, graph: ir.Graph) -> bool:
        """Transpose of a large constant that nothing else reads: a lazy initializer takes its place."""
        changed = False
        for node in list(graph):
            tensor = constant_tensor(node.inputs[0]) if node.op_type == "Transpose" and node.inputs else None
            source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
            if tensor is None or tensor.size <= self.input_limit or source is None or len(source.uses()) > 1:
                continue
            if node.domain not in ONNX_DOMAINS or source.is_graph_output() or output.is_graph_output():
                continue
            _replace_by_transposed(graph, node, tensor)
            changed = True
        return changed


def _replace_by_transposed(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    output = node.outputs[0]
    perm = attribute(node, "perm", None) or list(reversed(range(len(tensor.shape))))
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(perm)), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape([tensor.shape[axis] for axis in perm]),
        name=output.name,
    )
    source = node.inputs[0]
    _replace_by_initializer(graph, node, lazy)
    if source is not None and source.is_initializer() and source.name is not None:
        graph.initializers.pop(source.name, None)


def _replace_by_initializer(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    """Put an initializer under the name of the only output of `node` in its place."""
    output = node.outputs[0]
    name = output.name or "folded"
    output.name = f"{name}_folded"
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)


def _gather_elements(graph: ir.Graph, decide: _Decision) -> bool:
    """An initializer in place of each GatherElements of constants."""
    changed = False
    for node in list(graph):
        if node.op_type != "GatherElements" or node.domain not in ONNX_DOMAINS or not decide.fits(node):
            continue
        data, indices = constant(node.inputs[0]), constant(node.inputs[1])
        axis = int(attribute(node, "axis", 0))
        if data is None or indices is None or data.ndim != indices.ndim or not -data.ndim <= axis < data.ndim:
            continue
        axis %= data.ndim
        count = data.shape[axis]
        fits = all(i == axis or n <= m for i, (n, m) in enumerate(zip(indices.shape, data.shape, strict=True)))
        if not fits or (indices.size and not (-count <= indices.min() and indices.max() < count)):
            continue  # a runtime says so better
        others = tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(indices.shape))
        gathered = np.take_along_axis(data[others], indices % max(count, 1), axis)
        _replace_by_initializer(graph, node, ir.tensor(gathered, name=node.outputs[0].name))
        changed = True
    return changed


@dataclass
class _Decision:
    """Answers the library's question whether a node of constants is to be evaluated."""

    options: FoldConstants
    opset: int
    grown: int = field(default=0)

    def __call__(self, node: ir.Node) -> bool:
        foldable = node.domain in ONNX_DOMAINS and node.op_type in _FOLDABLE and len(node.outputs) == 1
        return foldable and self.fits(node) and _meaning_agrees(node)

    def fits(self, node: ir.Node) -> bool:
        """Whether all operands are constants, no output is the graph's, and sizes are within bounds."""
        if any(v.is_graph_output() for v in node.outputs):
            return False
        tensors = [constant_tensor(v) for v in node.inputs if v is not None]
        if any(t is None or t.dtype not in _NUMBERS or t.size > self.options.input_limit for t in tensors):
            return False
        return self._grows_little(node, [t for t in tensors if t is not None])

    def _grows_little(self, node: ir.Node, operands: list[ir.TensorProtocol]) -> bool:
        output = node.outputs[0]
        if output.shape is None or output.dtype is None or not output.shape.is_static():
            infer_node(node, self.opset)
        dims = shape_of(output)
        if dims is None or output.dtype not in _NUMBERS or output.dtype is None:
            return False
        size = 1
        for dim in dims:
            if not isinstance(dim, int):
                return False
            size *= dim
        dying = {v for v in node.inputs if v is not None and len(v.uses()) == 1}
        freed = sum(t.nbytes for v in dying if (t := constant_tensor(v)) is not None)
        growth = int(size * output.dtype.bitwidth / 8) - freed
        if growth > 0 and (size > self.options.output_limit or self.grown + growth > self.options.growth_limit):
            return False
        self.grown += max(growth, 0)
        return True


def _meaning_agrees(node: ir.Node) -> bool:
    """Whether NumPy and ONNX agree on this node's data, where they do not always."""
    if node.op_type in ("Div", "Mod", "Pow"):
        arrays = [constant(v) for v in node.inputs]
        integral = [a for a in arrays if a is not None and a.dtype.kind in "iu"]
        if len(integral) == len(arrays):
            return all(bool(np.all(a >= 0)) for a in integral) and bool(
                node.op_type == "Pow" or np.all(integral[1] > 0)
            )
        return not integral
    if node.op_type in ("Cast", "CastLike"):
        return _cast_agrees(node)
    return True


def _cast_agrees(node: ir.Node) -> bool:
    to = ir.DataType(attribute(node, "to", 0)) if node.op_type == "Cast" else node.inputs[1] and node.inputs[1].dtype
    data = constant(node.inputs[0])
    if data is None or not isinstance(to, ir.DataType) or to not in _NUMBERS:
        return False
    if to.is_integer() and data.dtype.kind not in "iub":
        return _in_range(data, to)
    return True


def _in_range(data: Array, to: ir.DataType) -> bool:
    bounds = np.iinfo(to.numpy())
    wide = data.astype(np.float64)
    return bool(np.all(np.isfinite(wide)) and np.all(wide >= bounds.min) and np.all(wide < bounds.max))
