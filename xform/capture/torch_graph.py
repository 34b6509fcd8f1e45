"""From the exporter's raw model to the container that passes expect: names the user knows, nothing wrapped up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from xform.capture.torch_calling import unique_names
from xform.capture.torch_program import PREFIX
from xform.graph.clone import SOURCE_OPSET

SOURCE_LINE = "xform.source_line"  # key in node.meta: the trace of Python lines that made the node
_EXPORTER = "pkg.torch."
_SCOPES = "pkg.torch.onnx.name_scopes"
_TRACE = "pkg.torch.onnx.stack_trace"
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def canonical_container(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], symbols: Mapping[str, str]
) -> ir.Model:
    """Rename what users know, inline functions, lift constants, in place.

    Args:
        inputs: Names of the graph inputs in order.
        outputs: Names of the graph outputs in order; one that an input has already gets a number.
        symbols: torch's names of symbolic sizes to the ones they shall have.
    """
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.OutputFixPass()(model)
    _strip_prefix(model.graph)
    _rename_interface(model.graph, inputs, outputs)
    _rename_symbols(model.graph, symbols)
    _name_nodes(model.graph)
    _drop_exporter_metadata(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    model.meta[SOURCE_OPSET] = model.opset_imports[""]
    return model


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _strip_prefix(graph: ir.Graph) -> None:
    """Give initializers the names that they have in the module's state_dict."""
    for name, value in list(graph.initializers.items()):
        if name.startswith(PREFIX) and name[len(PREFIX) :] not in graph.initializers:
            del graph.initializers[name]
            value.name = name[len(PREFIX) :]
            graph.initializers[value.name] = value


def _rename_interface(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    names = [*inputs, *unique_names(outputs, taken=inputs)]
    interface = [*graph.inputs, *graph.outputs]
    assert len(names) == len(interface), f"{len(interface)} graph inputs and outputs for {names}"
    wanted = dict(zip(map(id, interface), names, strict=True))
    taken = set(names)
    for value in list(_values(graph)):
        if id(value) not in wanted and value.name in taken:
            _rename(graph, value, unique_names([f"{value.name}_"], [v.name or "" for v in _values(graph)])[0])
    for value, name in zip(interface, names, strict=True):
        _rename(graph, value, name)


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.name is not None and graph.initializers.get(value.name) is value:
        del graph.initializers[value.name]
        value.name = name
        graph.initializers[name] = value
    else:
        value.name = name


def _rename_symbols(graph: ir.Graph, symbols: Mapping[str, str]) -> None:
    def rename(text: str) -> str:
        return _IDENTIFIER.sub(lambda match: symbols.get(match[0], match[0]), text)

    for value in _values(graph):
        if value.shape is None:
            continue
        dims = [dim if isinstance(dim, int) or dim.value is None else rename(dim.value) for dim in value.shape]
        if any(isinstance(dim, str) for dim in dims):
            # A size that was symbolic until the export fixed it is spelled as a number.
            dims = [int(dim) if isinstance(dim, str) and dim.isdigit() else dim for dim in dims]
            value.shape = ir.Shape([None if isinstance(dim, ir.SymbolicDim) else dim for dim in dims])


def _name_nodes(graph: ir.Graph) -> None:
    """Name every node after the submodule that it comes from: `encoder.layer.0.attention/softmax`."""
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    names = []
    for node in nodes:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
        scope = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module") else ""
        scope = scope[len(PREFIX) :] if scope.startswith(PREFIX) else "" if scope == PREFIX[:-1] else scope
        own = (scopes[-1] if scopes else node.name) or node.op_type
        names.append(f"{scope}/{own}" if scope else own)
    for node, name in zip(nodes, unique_names(names), strict=True):
        node.name = name


def _drop_exporter_metadata(model: ir.Model) -> None:
    """Keep the exporter's records out of saved models: they spell out the paths of the user's source files."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if (trace := node.metadata_props.get(_TRACE)) is not None:
            node.meta[SOURCE_LINE] = trace
        node.meta.pop("node", None)
        _drop(node.metadata_props)
    for value in _values(model.graph):
        _drop(value.metadata_props)
        value.meta.pop("node", None)
    _drop(model.graph.metadata_props)
    _drop(model.metadata_props)


def _drop(metadata: dict[str, str]) -> None:
    for key in [key for key in metadata if key.startswith(_EXPORTER)]:
        del metadata[key]
