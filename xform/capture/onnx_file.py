"""Capture of an ONNX model: from a file, bytes, a ModelProto or an onnx_ir model to xform's graph.

Steps: parse, check, build the IR, check external data, inline functions, convert up to the IR's opset, make constants
initializers, infer shapes. What the user gave is never changed. External data stays on disk until somebody reads it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from xform.capture.check_computed import check_computed, check_ranges
from xform.capture.check_proto import check_proto, check_tensors
from xform.capture.check_shapes import check_shapes
from xform.capture.constants import lift_constants
from xform.capture.external import check_external, check_external_ir, data_files
from xform.capture.input_shapes import InputShapes, fix_input_shapes
from xform.capture.loadable import refuse_unloadable
from xform.capture.read_proto import parse_bytes, parse_file
from xform.capture.sparse import densify
from xform.capture.walk import tensors
from xform.errors import ModelError, UsageError
from xform.graph.clone import SOURCE_OPSET, clone
from xform.graph.opset import IR_OPSET, upgrade
from xform.graph.shapes import infer_shapes
from xform.graph.values import Dim, shape_of
from xform.graph.write import SOURCE_DATA, SOURCE_PATH, skeleton
from xform.text import shown

NOTES = "xform.notes"  # key in model.meta: sentences that the user should see about the model
Source = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

MAX_CHECKED_BYTES = 1 << 30  # weights are searched for NaN up to this many bytes in all; beyond, outputs will tell
_CHUNK = 1 << 22


def capture_onnx(source: Source, *, strict: bool = False, input_shapes: InputShapes | None = None) -> ir.Model:
    """Read an ONNX model into the IR: one opset, no functions, no Constant nodes, shapes inferred.

    Args:
        source: A path, serialized bytes, a ModelProto, or an onnx_ir model. It is left as it is.
        strict: Refuse what would otherwise only be noted in `meta["xform.notes"]`: NaN weights, an unsorted graph.
        input_shapes: Sizes for dynamic dims of inputs, see `xform.capture.input_shapes`.

    Returns:
        A model whose `meta` carries the opset of the source and notes for the user. Names of inputs, outputs,
        dynamic dims and initializers are the source's own.

    Raises:
        ModelError: The source is no well-formed ONNX model, or no runtime could run it; says where and why.
        UsageError: `input_shapes` does not fit the model.
    """
    try:
        model = _capture(source, strict, input_shapes or {})
    except (ModelError, UsageError, MemoryError):
        raise
    except Exception as error:  # parsers and converters raise anything on a damaged model; the cause stays chained
        where = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
        raise ModelError(f"the model could not be read: {root_cause(error)}", where=where) from error
    return model


def files_of(path: Path) -> list[Path]:
    """A model's file and the data files that it points to; only the file where that is not ONNX, as capture tells."""
    try:
        return [path, *data_files((tensor for tensor, _ in tensors(parse_file(path))), path.parent)]
    except ModelError:
        return [path]


def read_onnx(path: Path) -> ir.Model:
    """A file as it is: checked, its weights left where they are, nothing upgraded, inlined or inferred.

    Raises:
        ModelError: The file is no well-formed ONNX model.
    """
    try:
        return _read(path)[0]
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # as above
        raise ModelError(f"the model could not be read: {root_cause(error)}", where=str(path)) from error


def notes(model: ir.Model) -> list[str]:
    """What capture found worth telling about a model: NaN weights, an unsorted graph, overridable weights."""
    found: list[str] = model.meta.setdefault(NOTES, [])
    return found


def root_cause(error: BaseException) -> str:
    """The innermost message of a chain of exceptions, with its type where the message alone says little."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0]
    return f"{text} ({type(error).__name__})" if text else type(error).__name__


def _capture(source: Source, strict: bool, input_shapes: InputShapes) -> ir.Model:
    model, unsorted = _read(source)
    versions = [model.opset_imports.get(""), *(f.opset_imports.get("") for f in model.functions.values())]
    model.meta[SOURCE_OPSET] = max((version for version in versions if version), default=IR_OPSET)
    _sort(model, unsorted, strict)
    _drop_forced_inputs(model)
    _open_negative_dims(model)
    _load_attribute_tensors(model)
    _settle_functions(model)
    check_ranges(model)
    upgrade(model, max(IR_OPSET, model.meta[SOURCE_OPSET]))
    _inline(model)
    lift_constants(model)
    _unshadow(model.graph, set())
    _note_non_finite(model, strict)
    fix_input_shapes(model, input_shapes)
    declared = [(value, value.dtype, shape_of(value)) for value in model.graph.outputs]
    infer_shapes(model)
    for value, dtype, shape in declared:
        _compare_declared(model, value, dtype, shape)
    check_computed(model)
    check_shapes(model)
    refuse_unloadable(model)
    return model


def _compare_declared(
    model: ir.Model, value: ir.Value, dtype: ir.DataType | None, shape: tuple[Dim, ...] | None
) -> None:
    """Refuse an output that is declared as another dtype than it has; note another shape, which runtimes accept."""
    if dtype is not None and value.dtype is not None and dtype != value.dtype:
        raise ModelError(
            f"an output is declared as {dtype.name}, and the graph computes {value.dtype.name}",
            where=value.name or "",
            hint="export the model again, or put a Cast before the output",
        )
    found = shape_of(value)
    if shape is None or found is None:
        return
    pairs = zip(shape, found, strict=False)
    if len(shape) != len(found) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        notes(model).append(
            f"output '{shown(value.name)}' is declared with shape {list(shape)}, and the graph computes {list(found)}; "
            "what it computes counts"
        )


def _read(source: Source) -> tuple[ir.Model, list[str]]:
    if isinstance(source, ir.Model):
        return _copy_model(source)
    folder, path = None, None
    if isinstance(source, bytes | bytearray | memoryview):
        proto = parse_bytes(bytes(source))
    elif isinstance(source, onnx.ModelProto):
        proto = source
        if not proto.HasField("graph"):
            raise ModelError("the ModelProto has no graph")
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        proto = parse_file(path)
        folder = path.parent
    else:
        raise ModelError(f"cannot read a model from {type(source).__name__}", hint="give a path, bytes or a ModelProto")
    check_tensors(proto)
    check_external(tensors(proto), folder)
    unsorted = check_proto(proto)
    model = ir.from_proto(densify(proto))
    if folder is not None and path is not None:
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            ir.external_data.set_base_dir(graph, folder)
        model.meta[SOURCE_PATH] = os.path.abspath(path)
        model.meta[SOURCE_DATA] = [
            os.path.abspath(file) for file in data_files((tensor for tensor, _ in tensors(proto)), folder)
        ]
    if isinstance(source, onnx.ModelProto):
        _own_tensors(model)
    if proto.training_info:
        notes(model).append(
            "the model carries training information, which an optimized model cannot keep; it is dropped"
        )
    return model, unsorted


def _copy_model(source: ir.Model) -> tuple[ir.Model, list[str]]:
    check_external_ir(source)
    proto = skeleton(source)
    check_tensors(proto)
    unsorted = check_proto(proto)
    model = clone(source)
    model.meta.pop(NOTES, None)
    _own_tensors(model)
    return model, unsorted


def _own_tensors(model: ir.Model) -> None:
    """Wrap tensors so that renaming one does not reach the user's tensor; the data stays shared."""
    tops = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in (graph for top in tops for graph in (top, *top.subgraphs())):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _share(value.const_value)
        for node in graph:
            for name, held in list(node.attributes.items()):
                if held.type is ir.AttributeType.TENSOR and not held.is_ref():
                    node.attributes[name] = ir.AttrTensor(name, _share(held.as_tensor()), held.doc_string)
                elif held.type is ir.AttributeType.TENSORS and not held.is_ref():
                    node.attributes[name] = ir.AttrTensors(name, [_share(t) for t in held.as_tensors()])


def _share(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
            doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props), base_dir=tensor.base_dir,
        )  # fmt: skip
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=_shape(tensor), name=tensor.name, doc_string=tensor.doc_string)
    return ir.LazyTensor(
        lambda: tensor,
        tensor.dtype,
        _shape(tensor),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor.shape.numpy())


def _sort(model: ir.Model, unsorted: list[str], strict: bool) -> None:
    if not unsorted:
        return
    few = ", ".join(unsorted[:5])
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except ValueError as error:
        raise ModelError(
            "the graph has a cycle: a node needs its own result",
            where=find_cycle(model.graph) or few,
            hint="export the model again; loops must be written with Loop or Scan",
        ) from error
    text = f"the graph was not sorted: {len(unsorted)} node inputs came before their producer ({few}); sorted it"
    if strict:
        raise ModelError(text, hint="export the model again, or run without strict")
    notes(model).append(text)


def find_cycle(graph: ir.Graph) -> list[str]:
    """Names of nodes along one cycle of the graph, in order; empty if there is none in this graph itself."""
    state: dict[ir.Node, bool] = {}  # False: on the current path, True: done
    for start in graph:
        path, stack = [], [(start, iter(start.predecessors()))]
        if start in state:
            continue
        state[start] = False
        path.append(start)
        while stack:
            node, before = stack[-1]
            following = next(before, None)
            if following is None:
                stack.pop()
                path.pop()
                state[node] = True
            elif following not in state:
                state[following] = False
                path.append(following)
                stack.append((following, iter(following.predecessors())))
            elif state[following] is False:
                cycle = path[path.index(following) :]
                return [f"{n.name or n.outputs[0].name} ({n.op_type})" for n in reversed(cycle)]
    return []


def _drop_forced_inputs(model: ir.Model) -> None:
    """Make weights constants again where the format forced them to be inputs.

    Up to IR version 3 every initializer had to be listed as an input as well. Since version 4 that is a choice and
    means that callers may override it, so there it is kept.
    """
    listed = [value for value in model.graph.inputs if value.is_initializer()]
    if model.ir_version < 4:
        for value in listed:
            model.graph.inputs.remove(value)
        model.ir_version = 4
    elif listed:
        notes(model).append(
            f"{len(listed)} initializers are listed as inputs, so callers may override them and they are not treated "
            "as constants; export with keep_initializers_as_inputs=False to change that"
        )


def _open_negative_dims(model: ir.Model) -> None:
    """Read a dim of -1 as "any size", as runtimes do; the format has no such spelling, but exporters write it."""
    for graph in model.graphs():
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and any(isinstance(dim, int) and dim < 0 for dim in value.shape.dims):
                value.shape = ir.Shape([None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape.dims])


def _load_attribute_tensors(model: ir.Model) -> None:
    """Load external tensors of attributes of subgraph nodes, which cannot become initializers of a file later."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for name, attr in list(node.attributes.items()):
            if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor):
                tensor = attr.value
                if node.op_type != "Constant" or node.outputs[0].is_graph_output():
                    node.attributes[name] = ir.AttrTensor(
                        name, ir.Tensor(tensor.numpy().copy(), tensor.dtype, shape=tensor.shape, name=tensor.name)
                    )


def _settle_functions(model: ir.Model) -> None:
    """Let functions be at the model's opsets, where `check_functions` has seen that this changes nothing."""
    for function in model.functions.values():
        for domain in set(function.opset_imports) & set(model.opset_imports):
            function.opset_imports[domain] = model.opset_imports[domain]


def _inline(model: ir.Model) -> None:
    if not model.functions:
        return
    used = {node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    if used & set(model.functions):
        InlinePass()(model)
    model.functions.clear()


def _unshadow(graph: ir.Graph, outer: set[str]) -> None:
    """Rename values of subgraphs that have the name of a value outside, so that names are unique in every scope."""
    own: list[ir.Value] = [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)]
    if outer:
        for value in own:
            if value.name and value.name in outer:
                value.name = _fresh(value.name, outer)
    names = outer | {value.name for value in own if value.name}
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                _unshadow(attr.as_graph(), names)
            elif attr.type == ir.AttributeType.GRAPHS:
                for inner in attr.as_graphs():
                    _unshadow(inner, names)


def _fresh(name: str, taken: set[str]) -> str:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


def _note_non_finite(model: ir.Model, strict: bool) -> None:
    total, found = 0, []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
                continue
            total += tensor.nbytes
            if total > MAX_CHECKED_BYTES:
                notes(model).append("weights over 1 GiB were not searched for NaN; verification would show them")
                return
            kind = non_finite(tensor.numpy())
            if kind:
                found.append(f"{value.name} ({kind})")
    if found:
        text = f"{len(found)} initializers hold values that are not finite: {', '.join(found[:5])}"
        if strict:
            raise ModelError(text, where=found, hint="train or export the model again, or run without strict")
        notes(model).append(text)


def non_finite(array: npt.NDArray[Any]) -> str:
    """ "NaN" or "+inf" if a float array has such an element, else "". Minus infinity is what masks are made of.

    Works on chunks, so that memory stays bounded for memory-mapped weights.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if bool(np.isnan(chunk).any()):
            return "NaN"
        if bool((np.isinf(chunk) & (chunk > 0)).any()):
            return "+inf"
    return ""
