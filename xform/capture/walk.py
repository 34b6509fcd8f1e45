"""Every tensor of a model's protobuf, wherever the format lets one hide.

The walk follows the message types themselves, not a list of known places: a field that a later version of ONNX adds is
walked too. So tensors are found in initializers, sparse initializers, attributes of nodes, nested graphs, functions,
default attributes of functions and training graphs alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from xform import limits


def tensors(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Every tensor of the model with a word on where it lies: "initializer 'w'", "attribute 'value' of x (Constant)".

    Raises:
        LimitError: Graphs are nested deeper than the limit `depth`.
    """
    yield from _walk(proto, None, None, 0)


def node_name(node: onnx.NodeProto) -> str:
    """The name a user knows a node by: its own, else its first output's."""
    name = node.name or next((o for o in node.output if o), "") or "(unnamed)"
    return f"{name} ({node.op_type})"


def _walk(
    message: Any, owner: Message | None, attribute: onnx.AttributeProto | None, depth: int
) -> Iterator[tuple[onnx.TensorProto, str]]:
    if isinstance(message, onnx.GraphProto):
        limits.check("depth", depth, "a nested graph", where=message.name)
        depth, attribute = depth + 1, None
    elif isinstance(message, onnx.AttributeProto):
        attribute = message
    else:
        owner = message
    for name, repeated in _fields(message.DESCRIPTOR):
        if repeated:
            children: Any = getattr(message, name)
        else:
            children = (getattr(message, name),) if message.HasField(name) else ()
        for child in children:
            if isinstance(child, onnx.TensorProto):
                yield child, _place(child, owner, attribute)
            else:
                yield from _walk(child, owner, attribute, depth)


def _place(tensor: onnx.TensorProto, owner: Any, attribute: onnx.AttributeProto | None) -> str:
    if attribute is None:
        return f"initializer '{tensor.name}'"
    name = node_name(owner) if isinstance(owner, onnx.NodeProto) else getattr(owner, "name", "")
    return f"attribute '{attribute.name}' of {name}" if name else f"attribute '{attribute.name}'"


@functools.cache
def _fields(descriptor: Descriptor) -> tuple[tuple[str, bool], ...]:
    """The fields of a message type through which a tensor can be reached, and whether each is repeated."""
    return tuple(
        (field.name, bool(field.is_repeated))
        for field in descriptor.fields
        if field.message_type is not None and _reaches(field.message_type)
    )


@functools.cache
def _reaches(descriptor: Descriptor) -> bool:
    seen, waiting = {descriptor.full_name}, [descriptor]
    while waiting:
        current = waiting.pop()
        if current is onnx.TensorProto.DESCRIPTOR or current.full_name == onnx.TensorProto.DESCRIPTOR.full_name:
            return True
        inner = [field.message_type for field in current.fields if field.message_type is not None]
        waiting += [kind for kind in inner if kind.full_name not in seen]
        seen.update(kind.full_name for kind in inner)
    return False
