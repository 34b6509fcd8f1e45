"""Attribute values that no operator has a meaning for: refused before any library computes with them.

ONNX's shape inference and ONNX Runtime divide by strides, groups and block sizes without looking; a zero there kills
the process. Some faults they see at run time only, or not where a rank is unknown. What they do see when they load a
model (`xform.capture.loadable`) is not repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx

from xform.capture.walk import node_name
from xform.errors import ModelError

MAX_RANK = 64  # NumPy's and the runtimes' own bound on axes
_A = onnx.AttributeProto

# Integers that count something or step through something, whatever the operator.
_AT_LEAST_ONE = frozenset(
    {"strides", "dilations", "kernel_shape", "group", "offset_group", "blocksize", "num_groups", "num_outputs"}
    | {"hidden_size", "num_heads", "kv_num_heads", "q_num_heads"}
)
_AXES = frozenset({"axis", "axes", "batch_axis", "time_axis", "scan_input_axes", "scan_output_axes"})
_DTYPES = frozenset({"to", "dtype", "output_dtype", "stash_type"})
_STRINGS: Mapping[str, frozenset[bytes]] = {
    "auto_pad": frozenset({b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID", b""}),
    "approximate": frozenset({b"none", b"tanh"}),
}


def check_attributes(node: onnx.NodeProto) -> None:
    """Refuse a node of which an attribute says nothing: a stride of 0, NaN, a permutation that is none.

    Attributes that a function takes from its caller are looked at where the caller gives them.

    Raises:
        ModelError: Names the node and the attribute.
    """
    values: dict[str, Sequence[float]] = {}
    for attr in node.attribute:
        if attr.name in values:
            raise _refused(node, f"attribute '{attr.name}' is given twice")
        values[attr.name] = _numbers(attr)
        problem = _problem(node, attr, values[attr.name])
        if problem:
            raise _refused(node, problem)
    _check_window(node, {name: len(numbers) for name, numbers in values.items() if numbers})


def _numbers(attr: onnx.AttributeProto) -> Sequence[float]:
    match attr.type:
        case _A.INT:
            return (attr.i,)
        case _A.INTS:
            return tuple(attr.ints)
        case _A.FLOAT:
            return (attr.f,)
        case _A.FLOATS:
            return tuple(attr.floats)
    return ()


def _problem(node: onnx.NodeProto, attr: onnx.AttributeProto, numbers: Sequence[float]) -> str:
    shown = f"'{attr.name}' = {list(numbers)[:8] if attr.type in (_A.INTS, _A.FLOATS) else numbers and numbers[0]}"
    if node.op_type != "Constant" and any(math.isnan(number) for number in numbers):
        return f"{shown} is not a number"
    if attr.type in (_A.INT, _A.INTS):
        if attr.name in _AT_LEAST_ONE and any(number < 1 for number in numbers):
            return f"{shown} must be at least 1"
        if attr.name in _AXES and any(not -MAX_RANK <= number <= MAX_RANK for number in numbers):
            return f"{shown}: no tensor has so many axes"
        if attr.name in _DTYPES and any(number not in onnx.TensorProto.DataType.values() for number in numbers):
            return f"{shown} is not a data type"
        if attr.name == "to" and numbers[:1] == (onnx.TensorProto.UNDEFINED,):
            return f"{shown} is not a data type"
        if node.op_type == "Transpose" and attr.name == "perm" and sorted(numbers) != list(range(len(numbers))):
            return f"{shown} is not a permutation of the axes"
    if attr.type == _A.STRING and attr.name in _STRINGS and attr.s not in _STRINGS[attr.name]:
        known = ", ".join(sorted(value.decode() for value in _STRINGS[attr.name] if value))
        return f"'{attr.name}' must be one of {known}"
    return ""


def _check_window(node: onnx.NodeProto, lengths: Mapping[str, int]) -> None:
    """Kernel, strides, dilations and pads of a sliding window are about the same axes."""
    counts = {name: lengths[name] for name in ("kernel_shape", "strides", "dilations") if name in lengths}
    if "kernel_shape" in counts and "pads" in lengths:
        counts["pads"] = lengths["pads"] // 2 if lengths["pads"] % 2 == 0 else -1
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {lengths[name]}" for name in counts)
        raise _refused(node, f"the lengths of its attributes do not fit each other: {text}")


def _refused(node: onnx.NodeProto, problem: str) -> ModelError:
    return ModelError(f"a node does not fit its operator: {problem}", where=node_name(node))
