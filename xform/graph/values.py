"""Reading values: constants, scalars, shapes, names. Nothing here changes a graph."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ORIGIN = "xform.origin"  # metadata of a node: names of the source nodes it was made from, comma separated
ONNX_DOMAINS = ("", "ai.onnx")

Array = npt.NDArray[Any]
Dim = int | str | None


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is known before the model runs.

    An initializer that is also a graph input can be overridden by the caller, so it is no constant.
    """
    if value is None or value.is_graph_input():
        return False
    producer = value.producer()
    if producer is None:  # an initializer, or one that a rewrite has made and not yet put into the graph
        return value.const_value is not None
    return producer.op_type == "Constant" and producer.domain in ONNX_DOMAINS


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant value, without loading its data; None if it is no constant."""
    if value is None or not is_constant(value):
        return None
    if value.const_value is not None:
        return value.const_value
    return ir.convenience.get_const_tensor(value)


def constant(value: ir.Value | None, *, max_elements: int | None = None) -> Array | None:
    """The data of a constant value as an array, or None.

    Args:
        max_elements: Give None for larger constants instead of loading them.
    """
    tensor = constant_tensor(value)
    if tensor is None or (max_elements is not None and tensor.size > max_elements):
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> Any | None:
    """The Python number of a constant with one element (rank 0, or any shape of ones), or None."""
    array = constant(value, max_elements=1)
    if array is None or array.size != 1 or array.dtype.kind in "OSU":
        return None
    return array.reshape(()).item() if array.dtype.kind in "biuf" else float(array.reshape(()).astype(np.float64))


def shape_of(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """Shape with static dims as int, symbolic dims as str, unknown dims as None; None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape.dims)


def rank_of(value: ir.Value | None) -> int | None:
    """Number of dimensions, or None if unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dims are provably equal: the same number, or the same symbol."""
    return a is not None and a == b


def same_size(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two lists of dims provably have one product, by numbers and names."""
    names = [sorted(str(dim) for dim in dims if not isinstance(dim, int)) for dims in (a, b)]
    if None in (*a, *b) or names[0] != names[1]:
        return False
    return prod(d for d in a if isinstance(d, int)) == prod(d for d in b if isinstance(d, int))


class Held(float):
    """A number that an attribute holds, or its default: another attribute holds it just as well.

    What is computed from it is a plain float.
    """


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of a node's attribute as plain Python (bytes decoded), or `default` when absent; floats are `Held`."""
    attr = node.attributes.get(name)
    return _held(default if attr is None else attr.value)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """All attributes of a node by name, as plain Python values; floats are `Held`."""
    return {name: _held(attr.value) for name, attr in node.attributes.items()}


def _held(value: Any) -> Any:
    return Held(value) if type(value) is float else value


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether `node` is one of these operators (default: of the standard ONNX domain)."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (domain == "" and node.domain in ONNX_DOMAINS)


def used_once(value: ir.Value) -> bool:
    """Whether exactly one node input reads `value` and it is not a graph output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def display_name(node: ir.Node) -> str:
    """The name a user knows a node by: its source nodes where recorded, else its own name, else its first output."""
    origin = node.metadata_props.get(ORIGIN)
    if origin:
        return origin
    return node.name or next((o.name for o in node.outputs if o.name), None) or node.op_type
