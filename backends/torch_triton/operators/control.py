"""If, Loop and Scan over submodules."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from xform.backends.torch_triton.functions import control
from xform.backends.torch_triton.lower.site import Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers


def _graph(site: Site, name: str) -> ir.Graph:
    return site.node.attributes[name].as_graph()


def _stem(site: Site, kind: str) -> str:
    return f"{site.node.name or site.node.op_type}_{kind}"


@lowers("If")
def if_(site: Site) -> Any:
    then, then_args = site.emitter.body(_graph(site, "then_branch"), _stem(site, "then"))
    otherwise, else_args = site.emitter.body(_graph(site, "else_branch"), _stem(site, "else"))
    result = site.call(control.branch, site.tensor(), then, otherwise, then_args, else_args)
    return site.pick(result, len(site.node.outputs))


@lowers("Loop")
def loop(site: Site) -> Any:
    graph = _graph(site, "body")
    body, outer = site.emitter.body(graph, _stem(site, "body"), int_inputs=(0,))
    trips = site.demand_ints(0).items[0] if site.has(0) else None
    carried = site.tensors(2)
    scans = []
    for value in graph.outputs[1 + len(carried) :]:
        if not isinstance(value.type, ir.TensorType):
            raise Unsupported("it collects sequences")
        shape = [d if isinstance(d, int) else 0 for d in (value.shape or ())]
        scans.append((site.torch_dtype(value.dtype or ir.DataType.FLOAT), tuple(shape)))
    result = site.call(control.loop, body, trips, site.optional(1), carried, outer, scans)
    return site.pick(result, len(site.node.outputs))


@lowers("Scan", since=9)
def scan(site: Site) -> Any:
    inputs = site.attr("num_scan_inputs")
    states = len(site.node.inputs) - inputs
    outputs = len(site.node.outputs) - states
    body, outer = site.emitter.body(_graph(site, "body"), _stem(site, "body"))
    names = ("scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions")
    counts = (inputs, inputs, outputs, outputs)
    how = [list(site.attr(name) or [0] * count) for name, count in zip(names, counts, strict=True)]
    tensors = site.tensors()
    result = site.call(control.scan, body, tensors[:states], tensors[states:], outer, *how)
    return site.pick(result, len(site.node.outputs))


@lowers("SequenceMap")
def sequence_map(site: Site) -> Any:
    body, outer = site.emitter.body(_graph(site, "body"), _stem(site, "body"))
    first, *others = site.tensors()
    result = site.call(control.map_sequence, body, first, others, outer, len(site.node.outputs))
    return site.pick(result, len(site.node.outputs))
