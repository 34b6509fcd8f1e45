"""Operator versions: what the ONNX specification says about each operator at each opset; no graph is touched."""

from __future__ import annotations

import bisect
from functools import cache
from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir

from xform.graph.values import ONNX_DOMAINS

OLDEST_OPSET = 1
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()


@cache
def _history() -> dict[str, dict[int, onnx.defs.OpSchema]]:
    """Every schema of the default domain: operator -> since_version -> schema."""
    history: dict[str, dict[int, onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain in ONNX_DOMAINS:
            history.setdefault(schema.name, {})[schema.since_version] = schema
    return history


@cache
def versions(op_type: str) -> tuple[int, ...]:
    """Every opset at which the definition of `op_type` changed, ascending; empty for an operator unknown to ONNX."""
    return tuple(sorted(_history().get(op_type, ())))


def operators() -> tuple[str, ...]:
    """Every operator that the default domain ever had."""
    return tuple(sorted(_history()))


@cache
def since(op_type: str, opset: int) -> int | None:
    """The version of `op_type` in force at `opset`, or None if it does not exist there yet."""
    known = versions(op_type)
    index = bisect.bisect_right(known, opset)
    return known[index - 1] if index else None


@cache
def next_version(op_type: str, opset: int) -> int | None:
    """The first version of `op_type` newer than `opset` that changes an existing definition, or None."""
    known = versions(op_type)
    index = bisect.bisect_right(known, opset)
    return known[index] if 0 < index < len(known) else None


@cache
def schema_at(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """The schema in force at `opset`, or None if the operator does not exist there."""
    version = since(op_type, opset)
    return None if version is None else _history()[op_type][version]


@cache
def is_deprecated(op_type: str, opset: int) -> bool:
    """Whether `op_type` may no longer be used at `opset`.

    GroupNormalization-18 is marked deprecated for a fault that version 21 cured; runtimes do run it.
    """
    schema = schema_at(op_type, opset)
    return schema is not None and schema.deprecated and op_type != "GroupNormalization"


@cache
def default_attributes(op_type: str, opset: int) -> dict[str, Any]:
    """Defaults of the attributes that have one, as plain Python (strings, not bytes)."""
    schema = schema_at(op_type, opset)
    if schema is None:
        return {}
    found: dict[str, Any] = {}
    for name, attribute in schema.attributes.items():
        if attribute.default_value.type:
            value = onnx.helper.get_attribute_value(attribute.default_value)
            found[name] = value.decode() if isinstance(value, bytes) else value
    return found


@cache
def _parameters(op_type: str, opset: int, outputs: bool) -> tuple[tuple[frozenset[str], bool], ...]:
    schema = schema_at(op_type, opset)
    if schema is None:
        return ()
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    formal = schema.outputs if outputs else schema.inputs
    return tuple((frozenset(p.types), p.option == variadic) for p in formal)


@cache
def allowed_types(op_type: str, opset: int, index: int, *, output: bool = False) -> frozenset[str]:
    """Types such as ``tensor(float)`` that input (or output) `index` may have; empty if there is no such input."""
    parameters = _parameters(op_type, opset, output)
    if index < len(parameters):
        return parameters[index][0]
    return parameters[-1][0] if parameters and parameters[-1][1] else frozenset()


@cache
def input_limit(op_type: str, opset: int) -> int:
    """The greatest number of inputs that the operator takes at `opset`."""
    parameters = _parameters(op_type, opset, False)
    return 1 << 30 if parameters and parameters[-1][1] else len(parameters)


@cache
def output_limit(op_type: str, opset: int) -> int:
    """The greatest number of outputs that the operator has at `opset`."""
    parameters = _parameters(op_type, opset, True)
    return 1 << 30 if parameters and parameters[-1][1] else len(parameters)


def type_string(type_: ir.TypeProtocol | None) -> str | None:
    """A value's type as the specification spells it, e.g. ``seq(tensor(int64))``; None if unknown."""
    if type_ is None:
        return None
    if isinstance(type_, ir.TensorType):
        return f"tensor({_ELEMENT.get(type_.dtype, type_.dtype.name.lower())})"
    if isinstance(type_, ir.SequenceType):
        inner = type_string(type_.elem_type)
        return None if inner is None else f"seq({inner})"
    if isinstance(type_, ir.OptionalType):
        inner = type_string(type_.elem_type)
        return None if inner is None else f"optional({inner})"
    return None


_ELEMENT = {
    ir.DataType.UNDEFINED: "undefined",
    ir.DataType.FLOAT: "float",
    ir.DataType.DOUBLE: "double",
}
