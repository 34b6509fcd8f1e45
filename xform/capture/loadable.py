"""What ONNX Runtime says of a captured model, without its weights: a model that it calls invalid is refused.

Types, arity, attributes and the shapes that are known are checked by the same code that would run the model. Only the
structure is loaded; large weights are declared as inputs, so this costs neither memory nor time. A missing kernel is
not a fault of the model: another backend may have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
import onnx_ir as ir
import onnxruntime as ort

from xform import limits
from xform.errors import ModelError
from xform.graph.shape_proto import node_proto, propagated_elements, skeleton
from xform.graph.values import display_name

_TAG = "xform_node_"
_TAGGED = re.compile(rf"{_TAG}(\d+)")
_NEWEST_OPSET = 26  # of the default domain that ONNX Runtime 1.31 knows
_MAX_IR_VERSION = 10
_ELEMENT_BYTES = 4096  # what runtimes and rewriters spend on one element of shape data, as a symbol
_ALONE = 2000  # nodes tried one by one to find the one at fault
# What the runtime lacks or gets wrong itself, in its words; none of it says that the model is wrong. A node without a
# name is one of a body that the runtime made for an operator without a kernel. Attributes were checked by onnx.
_LACKS = re.compile(
    r"NOT_IMPLEMENTED|Could not find an implementation|is till opset|[Uu]nsupported|not supported|is not implemented|"
    r"not yet supported|is not a registered function/op|Unrecognized attribute|in node \(\)|construct locale"
)
_NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Exception during initialization: |/onnxruntime_src/\S+:\d+ .*?\) (?=\S)"
)


def refuse_unloadable(model: ir.Model, foreign: frozenset[str] = frozenset()) -> None:
    """Refuse a captured model that ONNX Runtime calls invalid.

    Args:
        model: After shape inference, functions inlined.
        foreign: Domains that ONNX Runtime does not know; a model that uses one is not judged.

    Raises:
        ModelError: With the node's name and the runtime's reason.
        LimitError: `memory`: shape data that doubles itself would fill it while the model is loaded.
    """
    nodes = list(_nodes(model.graph))
    if model.opset_imports.get("", 1) > _NEWEST_OPSET or any(node.domain in foreign for node in nodes):
        return
    proto = skeleton(model, ())
    _check_shape_data(proto.graph)
    for number, node in enumerate(_proto_nodes(proto.graph)):
        node.name = f"{_TAG}{number}"
    reason = _reason(proto)
    if reason is None:
        return
    for value in proto.graph.output:  # what an output is declared as is a claim, which the graph may contradict
        value.ClearField("type")
    reason = _reason(proto)
    if reason is None:
        return
    tagged = _TAGGED.search(reason)
    culprit = nodes[int(tagged[1])] if tagged else _alone(model, nodes)
    name = "" if culprit is None else f"{display_name(culprit)} ({culprit.op_type})"
    raise ModelError(
        f"the model is invalid: {_readable(reason, name)}",
        where=name or (),
        hint="no runtime can compute it as it is; export the model again, or correct the node",
    )


def _check_shape_data(graph: onnx.GraphProto) -> None:
    for name, count in propagated_elements(graph).items():
        limits.check("memory", count * _ELEMENT_BYTES, f"the shape data '{name}' of {count} elements", where=name)


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every node, nested graphs after their node: the order of `_proto_nodes`."""
    for node in graph:
        yield node
        for attr in node.attributes.values():
            if attr.type is ir.AttributeType.GRAPH:
                yield from _nodes(attr.as_graph())
            elif attr.type is ir.AttributeType.GRAPHS:
                for inner in attr.as_graphs():
                    yield from _nodes(inner)


def _proto_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attr in node.attribute:
            for inner in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                yield from _proto_nodes(inner)


def _reason(proto: onnx.ModelProto) -> str | None:
    """Why ONNX Runtime calls the model invalid, in its own words; None if it does not."""
    proto.ir_version = min(proto.ir_version, _MAX_IR_VERSION)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_reuse = False  # planning it is quadratic where sizes are unknown; values are freed either way
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has no common class for its errors; what they say is what counts
        text = str(error).strip()
        return None if _LACKS.search(text) else text
    return None


def _alone(model: ir.Model, nodes: list[ir.Node]) -> ir.Node | None:
    """The first node that is refused by itself: kernels complain without a name."""
    for node in nodes[:_ALONE]:
        proto, types, constants = node_proto(node)
        graph = onnx.GraphProto(name="alone", node=[proto])
        graph.initializer.extend(constants.values())
        for name, kind in types.items():
            if name not in constants:
                graph.input.add(name=name).type.CopyFrom(kind)
        for name in proto.output:
            graph.output.add(name=name)
        whole = onnx.ModelProto(ir_version=_MAX_IR_VERSION, graph=graph)
        for domain, version in model.opset_imports.items():
            whole.opset_import.add(domain=domain, version=version)
        if _reason(whole) is not None:
            return node
    return None


def _readable(reason: str, name: str) -> str:
    """The runtime's first line without the places in its sources, with the node's own name."""
    return _TAGGED.sub(name.partition(" ")[0] or "a node", _NOISE.sub("", reason.splitlines()[0]))[:400]
