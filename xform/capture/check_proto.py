"""Structural checks on an ONNX protobuf, before anything is built from it.

What is checked: opset and IR versions, single assignment of names, no dangling input, order, operators that somebody
can run, node schemas, and that stored tensors hold as much data as they claim. No weight is loaded for it.
Source: the ONNX IR specification (https://onnx.ai/onnx/repo-docs/IR.html).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
from onnx.onnx_cpp2py_export import checker

from xform import limits
from xform.capture.check_nodes import MAX_RANK, check_attributes
from xform.capture.functions import Key, call_key, check_functions, function_key
from xform.capture.walk import node_name, tensors
from xform.errors import ModelError
from xform.graph.opset_schema import NEWEST_OPSET, OLDEST_OPSET

STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training"})

MAX_NAME = 1 << 16  # characters

_Operator = tuple[str, str]
_T = onnx.TensorProto
# Typed storage of a tensor without raw_data: the field, and how many elements one entry holds (below 1: parts of one).
_TYPED_FIELDS: dict[int, tuple[str, float]] = {
    _T.FLOAT: ("float_data", 1), _T.COMPLEX64: ("float_data", 0.5), _T.DOUBLE: ("double_data", 1),
    _T.COMPLEX128: ("double_data", 0.5), _T.INT64: ("int64_data", 1), _T.STRING: ("string_data", 1),
    _T.UINT32: ("uint64_data", 1), _T.UINT64: ("uint64_data", 1),
}  # fmt: skip


@dataclass
class _Scope:
    """Names of one graph: all that it defines, and those defined so far while walking its nodes."""

    declared: set[str]
    ready: set[str]
    outer: _Scope | None = None

    def declares(self, name: str) -> bool:
        return name in self.declared or (self.outer is not None and self.outer.declares(name))

    def has(self, name: str) -> bool:
        return name in self.ready or (name not in self.declared and self.outer is not None and self.outer.has(name))


@dataclass
class _Context:
    opsets: dict[str, int]
    functions: frozenset[Key]
    checker: checker.CheckerContext
    unsorted: list[str] = field(default_factory=list)
    in_function: bool = False


def check_proto(proto: onnx.ModelProto) -> list[str]:
    """Refuse a model that is not well formed.

    Returns:
        Names of nodes that stand before a node whose output they read. The specification forbids that; such a graph
        can be sorted unless it has a cycle.

    Raises:
        ModelError: Names the node, value or initializer, and what is wrong with it.
    """
    opsets = _opsets(proto.opset_import, "the model")
    _check_versions(proto, opsets)
    check_functions(proto, known_operators())
    functions = frozenset(map(function_key, proto.functions))
    context = _Context(opsets, functions, _checker_context(opsets, proto.ir_version))
    _check_graph(proto.graph, None, context, 0)
    _check_interface(proto.graph)
    for function in proto.functions:
        own = opsets | _opsets(function.opset_import, f"function {function.name}")
        inner = _Context(own, functions, _checker_context(own, proto.ir_version), context.unsorted, True)
        scope = _Scope(set(function.input), set(function.input))
        _declare(scope, (o for node in function.node for o in node.output), f"function {function.name}")
        _check_nodes(function.node, scope, inner, 0)
        _check_outputs(function.output, scope, f"function {function.name}")
    return context.unsorted


def check_tensors(proto: onnx.ModelProto) -> None:
    """Refuse a tensor, wherever it lies, whose type is unknown or whose data is not as long as its shape says.

    Raises:
        ModelError: Says where it lies.
    """
    for tensor, where in tensors(proto):
        check_tensor(tensor, where)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _opsets(imports: Iterable[onnx.OperatorSetIdProto], where: str) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = _domain(entry.domain)
        if domain != "" and not 0 <= entry.version < 2**31:
            raise ModelError(f"{where} imports domain '{domain}' at the impossible version {entry.version}")
        if opsets.setdefault(domain, entry.version) != entry.version:
            versions = f"{opsets[domain]} and {entry.version}"
            raise ModelError(f"{where} imports domain '{domain or 'ai.onnx'}' at two versions: {versions}")
    return opsets


def _check_versions(proto: onnx.ModelProto, opsets: dict[str, int]) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"the model has IR version {proto.ir_version}; the installed onnx knows up to {onnx.IR_VERSION}",
            hint="upgrade onnx: pip install -U onnx",
        )
    version = opsets.get("", NEWEST_OPSET if opsets else OLDEST_OPSET)
    if version < OLDEST_OPSET:
        raise ModelError(f"the model is at opset {version}, which does not exist", hint="export it again")
    if version > NEWEST_OPSET:
        raise ModelError(
            f"the model is at opset {version}; the installed onnx knows up to {NEWEST_OPSET}",
            hint="upgrade onnx (pip install -U onnx), or export at an older opset",
        )


def _checker_context(opsets: dict[str, int], ir_version: int) -> checker.CheckerContext:
    context = checker.CheckerContext()
    context.ir_version = max(ir_version, 3)
    context.opset_imports = opsets
    return context


def _check_graph(graph: onnx.GraphProto, outer: _Scope | None, context: _Context, depth: int) -> None:
    limits.check("depth", depth, "a nested graph", where=graph.name)
    where = f"graph '{graph.name}'"
    inputs = [value.name for value in graph.input]
    if "" in inputs:
        raise ModelError(f"input {inputs.index('')} of {where} has no name")
    scope = _Scope(set(), set(), outer)
    _declare(scope, inputs, where)
    stored = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    for name in stored:
        _check_length(name)
    for name, count in Counter(stored).items():
        if count > 1 and name:
            raise ModelError(f"{where} has {count} initializers of one name", where=name)
    scope.declared.update(name for name in stored if name)
    scope.ready = set(scope.declared)
    _declare(scope, (o for node in graph.node for o in node.output), where)
    _check_nodes(graph.node, scope, context, depth)
    _check_outputs((value.name for value in graph.output), scope, where)


def _declare(scope: _Scope, names: Iterable[str], where: str) -> None:
    for name in names:
        _check_length(name)
        if name and name in scope.declared:
            raise ModelError(
                f"the value '{name}' is defined twice in {where}",
                where=name,
                hint="every value must be computed by one node; rename one of the two",
            )
        scope.declared.add(name)
    scope.declared.discard("")


def _check_outputs(names: Iterable[str], scope: _Scope, where: str) -> None:
    for name in names:
        if name not in scope.declared:
            outside = scope.declares(name)
            raise ModelError(
                f"the output '{name}' of {where} is computed by no node" + (" of that graph" if outside else ""),
                where=name,
                hint="put an Identity node in between" if outside else "the file is damaged; export it again",
            )


def _check_length(name: str) -> None:
    """Names are copied, compared and searched everywhere; one of megabytes makes all of that slow."""
    if len(name) > MAX_NAME:
        raise ModelError(f"a name has {len(name)} characters; at most {MAX_NAME} are read", where=name)


def _check_nodes(nodes: Iterable[onnx.NodeProto], scope: _Scope, context: _Context, depth: int) -> None:
    for node in nodes:
        for name in node.input:
            if not name or scope.has(name):
                continue
            if not scope.declares(name):
                raise ModelError(
                    f"a node reads the value '{name}', which nothing defines",
                    where=node_name(node),
                    hint="the file is damaged, or was cut out of a larger model",
                )
            context.unsorted.append(node_name(node))
        _check_length(node.name)
        _check_operator(node, context)
        if not context.in_function and any(attr.ref_attr_name for attr in node.attribute):
            raise ModelError("a node outside of functions takes an attribute from a caller", where=node_name(node))
        for attr in node.attribute:
            for graph in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                _check_graph(graph, scope, context, depth + 1)
        scope.ready.update(node.output)


def _check_operator(node: onnx.NodeProto, context: _Context) -> None:
    domain = _domain(node.domain)
    if call_key(node) in context.functions:
        return
    check_attributes(node)
    if (domain, node.op_type) in runtime_operators():  # some of them have no domain: SimplifiedLayerNormalization
        return
    if (domain, node.op_type) in _standard_operators():
        _check_schema(node, domain, context)
    else:  # onnx.checker lets some pass that ONNX has given up: ScaledTanh
        known = any(domain == d for d, _ in known_operators())
        raise ModelError(
            f"no runtime has the operator '{node.op_type}' of domain '{domain or 'ai.onnx'}'"
            + ("" if known else ", and the model carries no function body for it"),
            where=node_name(node),
            hint="export the model without custom operators, or add the operator as a model-local function",
        )


def _check_schema(node: onnx.NodeProto, domain: str, context: _Context) -> None:
    if domain not in context.opsets:
        raise ModelError(
            f"the model uses domain '{domain or 'ai.onnx'}' but imports no opset of it", where=node_name(node)
        )
    light = node
    if any(attr.HasField("g") or attr.graphs for attr in node.attribute):
        light = onnx.NodeProto()
        light.CopyFrom(node)
        for attr in light.attribute:  # subgraphs are walked by _check_graph, which knows the outer names
            for graph in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                graph.Clear()
                graph.name = "subgraph"
    if domain != node.domain:
        light = light if light is not node else _copy(node)
        light.domain = domain
    try:
        checker.check_node(light.SerializeToString(), context.checker, checker.LexicalScopeContext())
    except checker.ValidationError as error:
        reason = str(error).split("\n\n==> Context")[0].strip()
        raise ModelError(f"a node does not fit its operator: {reason}", where=node_name(node)) from error


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


@functools.cache
def runtime_operators() -> frozenset[_Operator]:
    """(domain, operator) of everything beyond standard ONNX that the installed ONNX Runtime has a schema for."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    newest: dict[_Operator, Any] = {}
    for schema in state.get_all_operator_schema():
        key = _domain(schema.domain), schema.name
        if key not in newest or schema.since_version > newest[key].since_version:
            newest[key] = schema
    return frozenset({key for key, schema in newest.items() if not schema.deprecated} - _standard_operators())


@functools.cache
def known_operators() -> frozenset[_Operator]:
    """(domain, operator) of everything that a runtime knows by itself, at whatever version."""
    return runtime_operators() | _standard_operators()


@functools.cache
def _standard_operators() -> frozenset[_Operator]:
    return frozenset((_domain(schema.domain), schema.name) for schema in onnx.defs.get_all_schemas_with_history())


def check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Refuse a stored tensor whose type is unknown or whose data is not as long as its shape says.

    Raises:
        ModelError: With `where` and both sizes. The file of an external tensor is not looked at here.
    """
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelError(f"a tensor has the unknown data type {tensor.data_type}", where=where) from error
    if dtype == ir.DataType.UNDEFINED or any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"a tensor has no valid type and shape: {dtype.name} {list(tensor.dims)}", where=where)
    if len(tensor.dims) > MAX_RANK:
        raise ModelError(f"a tensor has {len(tensor.dims)} axes, more than any runtime takes", where=where)
    if tensor.HasField("segment"):
        raise ModelError("a tensor is stored in segments, which no runtime reads", where=where)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise ModelError("a tensor of strings cannot be external data", where=where)
        return
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        expected, have, unit = math.ceil(count * dtype.bitwidth / 8), len(tensor.raw_data), "bytes"
    else:
        name, elements = _typed_field(dtype)
        expected, have, unit = math.ceil(count / elements), len(getattr(tensor, name)), "values"
    if have != expected:
        raise ModelError(
            f"a tensor of shape {list(tensor.dims)} and type {dtype.name} needs {expected} {unit}, {have} are stored",
            where=where,
            hint="the file is damaged; export it again",
        )


def _typed_field(dtype: ir.DataType) -> tuple[str, float]:
    if dtype.value in _TYPED_FIELDS:
        return _TYPED_FIELDS[dtype.value]
    return "int32_data", 8 // dtype.bitwidth if dtype.bitwidth in (2, 4) else 1


def _check_interface(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind == "map_type" or (kind == "sequence_type" and value.type.sequence_type.elem_type.HasField("map_type")):
            raise ModelError(
                "an input or output is a map, which xform does not handle",
                where=value.name,
                hint="export classifiers with tensors as outputs (skl2onnx: options={'zipmap': False})",
            )
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            _check_length(dim.dim_param)
        if len(value.type.tensor_type.shape.dim) > MAX_RANK:
            raise ModelError("an input or output has more axes than any runtime takes", where=value.name)
    for value in graph.input:
        if value.type.WhichOneof("value") is None:
            raise ModelError("an input has no type", where=value.name, hint="export the model again with typed inputs")
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type not in _element_types():
            raise ModelError("an input has no valid element type", where=value.name)


@functools.cache
def _element_types() -> frozenset[int]:
    return frozenset(t.value for t in ir.DataType if t != ir.DataType.UNDEFINED)
