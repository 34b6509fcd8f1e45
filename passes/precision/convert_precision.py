"""Float32 graphs in float16, with what float16 cannot hold left in float32.

    MatMul(x, W)  ~  Cast<float>(MatMul(Cast<float16>(x), W16))          W16 = float16(W)

1. Products and convolutions with large constant weights compute in float16, and whatever reads what they give follows,
   so that casts stand only where a region begins or ends. Casts of one value are shared.
2. Inputs and outputs keep their dtype: the interface of a model never changes.
3. Stays in float32: norms, softmax, sums and means, exponentials, powers and angles, whose intermediate results leave
   float16's range (65504) or lose what the result depends on; attention, whose softmax is inside; random numbers;
   whatever is defined for float32 alone; control flow with all of its subgraphs; products in int8.
4. Stays in float32: what reads a constant that float16 cannot hold: a finite number beyond 65504 (a mask of -3.4e38),
   or one whose largest number is below 6.1e-5 (an epsilon), which would become zero.
5. Positions, masks and angles, which no large weight is behind, stay in float32, as integers above 2048 are not exact
   in float16.

Weights take half the bytes. Whether it is faster depends on the processor: with float16 arithmetic it is; elsewhere
ONNX Runtime computes in float32 between casts of its own.

Source: Micikevicius et al. 2018, "Mixed Precision Training", sections 3 and 4, for what has to stay in float32.
Limits of float16: IEEE 754-2008, binary16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from xform.errors import UsageError
from xform.graph.values import ORIGIN, constant_tensor, display_name, is_op
from xform.rewrite.passes import Fidelity, Pass, PassContext

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_FEWEST_WEIGHTS = 1 << 10  # of a product that begins a region: two casts cost more than smaller ones save
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_STAY = {
    "norms": ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization",
              "BatchNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN"),
    "sums and means": ("ReduceSum", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
                       "ReduceLogSumExp", "ReduceSumSquare", "CumSum", "CumProd", "GlobalAveragePool", "Sum", "Mean",
                       "Einsum"),
    "exponentials, powers and angles": ("Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax", "Softplus",
                                        "Sin", "Cos", "Tan", "Sinh", "Cosh", "Hardmax"),
    "attention": ("Attention", "RotaryEmbedding"),
    "conversions": ("Cast", "CastLike", "Range", "ConstantOfShape", "EyeLike", "Constant", "BitCast"),
    "random numbers": ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
                       "Bernoulli", "Dropout"),
    "control flow": ("If", "Loop", "Scan", "SequenceMap"),
    "codes": ("QuantizeLinear", "DequantizeLinear"),
    "recurrent states": ("LSTM", "GRU", "RNN"),
}  # fmt: skip
_REASON = {op_type: reason for reason, op_types in _STAY.items() for op_type in op_types}


@dataclass(frozen=True)
class ConvertPrecision(Pass):
    """Products and what follows them in float16.

    Attributes:
        dtype: "float16".
        keep: Original names of nodes that stay in float32.
    """

    name: ClassVar[str] = "convert_precision"
    fidelity: ClassVar[Fidelity] = "approximate"

    dtype: str = "float16"
    keep: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: PassContext) -> bool:
        """Convert the main graph. Raises UsageError for another dtype than float16."""
        if self.dtype != "float16":
            raise UsageError(f"convert_precision makes float16, not {self.dtype!r}")
        if context.exhausted:
            return False
        conversion = _Conversion(model, frozenset(self.keep))
        conversion.convert()
        for reason, nodes in conversion.kept.items():
            context.remark(self.name, "float16", "missed", nodes, reason, "precision")
        if conversion.converted:
            done = ", ".join(f"{count} {op_type}" for op_type, count in conversion.counts.most_common(6))
            told = f"{len(conversion.converted)} nodes compute in float16: {done}"
            context.remark(self.name, "float16", "applied", conversion.converted, told, "precision")
            context.applications += 1
            common_passes.RemoveUnusedNodesPass()(model)
        return bool(conversion.converted)


class _Conversion:
    """One conversion of a main graph, in the order of its nodes."""

    def __init__(self, model: ir.Model, keep: frozenset[str]) -> None:
        self.graph = model.graph
        self.converted: list[str] = []
        self.counts: Counter[str] = Counter()
        self.kept: dict[str, list[str]] = {}
        self._keep = keep
        self._opset = model.opset_imports.get("", 0)
        self._halves: set[ir.Value] = set()  # results that were float32
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._names = {v.name for n in model.graph.all_nodes() for v in (*n.outputs, *n.inputs) if v is not None}
        self._names |= {node.name for node in model.graph.all_nodes()} | set(model.graph.initializers)

    def convert(self) -> None:
        """Every node in order, then what subgraphs and outputs read."""
        for node in list(self.graph):
            reason = self._reason(node)
            if reason is None:
                self._convert(node)
            else:
                if reason:
                    self.kept.setdefault(reason, []).append(display_name(node))
                self._read_floats(node)
        self._restore_outputs()

    def _reason(self, node: ir.Node) -> str | None:
        """Why a node stays in float32, empty where that is nothing to tell; None where it does not."""
        if node.domain not in ("", "ai.onnx"):
            return ""
        floats = [value for value in node.inputs if value is not None and value.dtype in (_FLOAT, _HALF)]
        if not (any(value.dtype is _HALF for value in floats) or self._begins(node)):
            return ""
        if node.op_type in _REASON:
            return f"{_REASON[node.op_type]} stay in float32" if self._halves.intersection(floats) else ""
        free = {index: allowed for index, allowed in self._formal(node) if allowed is not None}
        values = [node.inputs[index] for index in free]
        if all(value is not None and value.dtype is _HALF and value not in self._halves for value in values):
            return ""  # it is in float16 already
        if display_name(node) in self._keep:
            return "it was asked to stay"
        if not all("tensor(float16)" in allowed for allowed in free.values()):
            return f"{node.op_type} is defined for float32 alone"
        return "it reads a constant that float16 cannot hold" if any(map(_is_beyond, values)) else None

    def _begins(self, node: ir.Node) -> bool:
        """Whether it is a product or convolution with a large constant weight."""
        weights = [constant_tensor(value) for value in node.inputs[:2]] if is_op(node, *_PRODUCTS) else []
        return any(weight is not None and weight.size >= _FEWEST_WEIGHTS for weight in weights)

    def _schema(self, node: ir.Node) -> tuple[onnx.defs.OpSchema, dict[str, Sequence[str]]]:
        """Of the operator of a node, with what each of its type variables allows."""
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        return schema, {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}

    def _formal(self, node: ir.Node) -> Iterator[tuple[int, Sequence[str] | None]]:
        """Places of float inputs, with what their type variable allows; None where the type is fixed."""
        schema, types = self._schema(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_FLOAT, _HALF):
                yield index, types.get(schema.inputs[min(index, len(schema.inputs) - 1)].type_str)

    def _convert(self, node: ir.Node) -> None:
        schema, types = self._schema(node)
        for index, allowed in list(self._formal(node)):
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, self._as(value, _FLOAT if allowed is None else _HALF))
        for index, output in enumerate(node.outputs):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            if output.dtype is _FLOAT and formal.type_str in types:
                output.type = ir.TensorType(_HALF)
                self._halves.add(output)
        self.converted.append(display_name(node))
        self.counts[node.op_type] += 1

    def _read_floats(self, node: ir.Node) -> None:
        """A node in float32 reads float32, its subgraphs included."""
        for reader in (node, *_inner_nodes(node)):
            for index, value in enumerate(reader.inputs):
                if value in self._halves:
                    reader.replace_input_with(index, self._as(value, _FLOAT))

    def _restore_outputs(self) -> None:
        """Outputs of the graph are float32 again, under their names."""
        for output in dict.fromkeys(self.graph.outputs):
            if output in self._halves:
                restored = self._as(output, _FLOAT)
                name, output.name = output.name, self._unique(f"{output.name}_float16")
                restored.name = name
                for index, other in enumerate(self.graph.outputs):
                    if other is output:
                        self.graph.outputs[index] = restored

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in a dtype: itself, a constant of that dtype, or a cast, made once."""
        if value.dtype is dtype:
            return value
        if (value, dtype) not in self._casts:
            is_constant = value.const_value is not None
            self._casts[value, dtype] = self._constant(value) if is_constant else self._cast(value, dtype)
        return self._casts[value, dtype]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy().astype(np.float16)
        name = self._unique(f"{value.name}_float16")
        tensor = ir.tensor(array, name=name)
        made = ir.Value(name=name, type=ir.TensorType(_HALF), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        producer = value.producer()
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=self._unique(f"{value.name}_Cast"))
        made = node.outputs[0]
        made.name, made.type = self._unique(f"{value.name}_{dtype.name.lower()}"), ir.TensorType(dtype)
        made.shape = None if value.shape is None else value.shape.copy()
        if producer is not None:
            node.metadata_props[ORIGIN] = display_name(producer)
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return made

    def _unique(self, hint: str) -> str:
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name


def _is_beyond(value: ir.Value | None) -> bool:
    """Whether a constant has finite numbers beyond float16's range, or none that float16 can tell from zero."""
    tensor = constant_tensor(value)
    if tensor is None:
        return False
    sizes = np.abs(tensor.numpy().astype(np.float32))
    sizes = sizes[np.isfinite(sizes)]
    peak = float(sizes.max(initial=0.0))
    return peak > _LARGEST or 0 < peak < _SMALLEST_NORMAL


def _inner_nodes(node: ir.Node) -> list[ir.Node]:
    """Nodes of all subgraphs of a node."""
    found: list[ir.Node] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        graphs = [attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else []
        graphs += list(attribute.as_graphs()) if attribute.type is ir.AttributeType.GRAPHS else []
        for graph in graphs:
            found += list(graph.all_nodes())
    return found
