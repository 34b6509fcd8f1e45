"""Model-local functions, checked before they are inlined: what they expand to, and that they mean one thing.

ONNX Runtime gives the operators in a function the meaning that they have at the opset of the *model*, whatever the
function imports; onnx's reference does the same for some functions only. The specification calls a model invalid whose
function imports an opset that defines one of its operators differently. So does a function that is named like an
operator of the runtime mean two things: the runtime computes the operator, the reference computes the function. Both
are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from xform import limits
from xform.capture.walk import node_name
from xform.errors import ModelError
from xform.graph.opset import same_meaning

Key = tuple[str, str, str]  # domain, name, overload


def function_key(function: onnx.FunctionProto) -> Key:
    """What a call names the function by."""
    return _domain(function.domain), function.name, function.overload


def call_key(node: onnx.NodeProto) -> Key:
    """The function that a node calls, if there is one."""
    return _domain(node.domain), node.op_type, node.overload


def check_functions(proto: onnx.ModelProto, taken: frozenset[tuple[str, str]]) -> None:
    """Refuse functions that mean two things, call themselves, or expand to more nodes than the limits allow.

    Args:
        taken: (domain, name) of every operator that a runtime knows by itself.

    Raises:
        ModelError: Names the function, or the node that calls it.
        LimitError: `nodes` or `depth`.
    """
    if not proto.functions:
        return
    functions: dict[Key, onnx.FunctionProto] = {}
    for function in proto.functions:
        if functions.setdefault(function_key(function), function) is not function:
            raise ModelError("the model has two functions of one domain, name and overload", where=_shown(function))
    expansion = _Expansion(functions)
    total = expansion.of(proto.graph.node)
    written = sum(1 for body in (proto.graph.node, *(f.node for f in proto.functions)) for _ in nodes_of(body))
    limits.check("nodes", total, f"a model of {written} nodes, its functions inlined,", brought=written)
    versions = {_domain(entry.domain): entry.version for entry in proto.opset_import}
    for key in expansion.sizes:
        _check_called(functions[key], versions, taken)
    bodies = [proto.graph.node, *(functions[key].node for key in expansion.sizes)]
    for node in (node for body in bodies for node in nodes_of(body)):
        if (called := functions.get(call_key(node))) is not None:
            _check_call(node, called, versions)


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of the graphs nested in them."""
    for node in nodes:
        yield node
        for attr in node.attribute:
            for graph in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                yield from nodes_of(graph.node)


@dataclass
class _Expansion:
    """How many nodes each called function becomes, counted without making any of them."""

    functions: Mapping[Key, onnx.FunctionProto]
    sizes: dict[Key, int] = field(default_factory=dict)
    _open: list[Key] = field(default_factory=list)

    def of(self, nodes: Iterable[onnx.NodeProto]) -> int:
        return sum(self._call(key) if (key := call_key(n)) in self.functions else 1 for n in nodes_of(nodes))

    def _call(self, key: Key) -> int:
        if key not in self.sizes:
            if key in self._open:
                circle = [_shown(self.functions[k]) for k in (*self._open[self._open.index(key) :], key)]
                raise ModelError(
                    "a function calls itself; functions are macros and cannot be recursive",
                    where=circle,
                    hint="write the recursion as a Loop",
                )
            self._open.append(key)
            limits.check("depth", len(self._open), "a chain of functions", where=_shown(self.functions[key]))
            self.sizes[key] = self.of(self.functions[key].node)
            self._open.pop()
        return self.sizes[key]


def _check_called(function: onnx.FunctionProto, versions: Mapping[str, int], taken: frozenset[tuple[str, str]]) -> None:
    where = _shown(function)
    if (_domain(function.domain), function.name) in taken:
        raise ModelError(
            f"a function is named like the operator {function.name} of domain '{function.domain or 'ai.onnx'}': "
            "runtimes compute the operator, others the function",
            where=where,
            hint="give the function a domain of its own",
        )
    own = {_domain(entry.domain): entry.version for entry in function.opset_import}
    for node in nodes_of(function.node):
        domain = _domain(node.domain)
        if domain not in own or domain not in versions or own[domain] == versions[domain]:
            continue
        if not same_meaning(domain, node.op_type, own[domain], versions[domain]):
            raise ModelError(
                f"function {where} imports opset {own[domain]} of domain '{domain or 'ai.onnx'}' and the model opset "
                f"{versions[domain]}, between which {node.op_type} changed: runtimes disagree on what it computes",
                where=node_name(node),
                hint="convert the model and its functions to one opset, or inline the functions "
                "(onnx.inliner.inline_local_functions with convert_version=True)",
            )


def _check_call(node: onnx.NodeProto, function: onnx.FunctionProto, versions: Mapping[str, int]) -> None:
    if _domain(node.domain) not in versions:
        raise ModelError(
            f"the model calls functions of domain '{node.domain}' but imports no opset of it", where=node_name(node)
        )
    for what, given, declared in (
        ("inputs", len(node.input), len(function.input)),
        ("outputs", len(node.output), len(function.output)),
    ):
        if given > declared:
            raise ModelError(
                f"a node has {given} {what}, the function that it calls has {declared}", where=node_name(node)
            )


def _shown(function: onnx.FunctionProto) -> str:
    name = f"{function.domain}.{function.name}" if function.domain else function.name
    return f"{name}:{function.overload}" if function.overload else name


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
