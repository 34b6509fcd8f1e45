"""Nodes of domain `torch`: operators that ONNX has no meaning for, called as they were in the module.

A node is named like the operator overload. Attribute `inputs` says which argument each input is (`x`, or `tensors[1]`
for an element of a list); all other attributes are arguments by name, dtypes and devices as strings, an empty list as
the string "[]". What type an argument has is read off the operator's schema.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from xform.backends.torch_triton.lower.site import Ints, Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers

_ELEMENT = re.compile(r"(\w+)\[(\d+)\]")
_EMPTY = "[]"


@lowers("*", domain="torch")
def torch_node(site: Site) -> Any:
    operator = _operator(site.node.op_type)
    types = {argument.name: argument.type for argument in operator._schema.arguments}
    arguments: dict[str, Any] = {}
    for name in site.node.attributes:
        if name != "inputs":
            arguments[name] = _value(site, types.get(name), site.attr(name))
    names = site.attr("inputs", _EMPTY)
    for index, name in enumerate([] if names == _EMPTY else names):
        _place(arguments, name, _input(site, index, types, name))
    ordered = [a for a in operator._schema.arguments if a.name in arguments]
    positional = [arguments[a.name] for a in ordered if not a.kwarg_only]
    gap = len(positional) != len([a for a in operator._schema.arguments if not a.kwarg_only][: len(positional)])
    keywords = {a.name: arguments[a.name] for a in ordered if a.kwarg_only or gap}
    leading = [a.name for a in operator._schema.arguments if not a.kwarg_only][: len(positional)]
    if [a.name for a in ordered if not a.kwarg_only] != leading:
        positional, keywords = [], {a.name: arguments[a.name] for a in ordered}
    result = site.call(operator, *positional, **keywords)
    returns = operator._schema.returns
    if len(returns) == 1 and str(returns[0].type) != "List[Tensor]":
        return result
    return site.pick(result, len(site.node.outputs))


def _operator(name: str) -> Any:
    """`aten.igamma.default` as the operator overload. Raises Unsupported if this torch has none of this name."""
    found: Any = torch.ops
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise Unsupported(f"torch {torch.__version__} has no operator {name}") from error
    return found


def _place(arguments: dict[str, Any], name: str, value: Any) -> None:
    element = _ELEMENT.fullmatch(name)
    if element is None:
        arguments[name] = value
        return
    items = arguments.setdefault(element[1], [])
    items.extend([None] * (int(element[2]) + 1 - len(items)))
    items[int(element[2])] = value


def _input(site: Site, index: int, types: dict[str, Any], name: str) -> Any:
    """A tensor, or the number in it where the operator takes a number."""
    kind = str(types.get(name.split("[")[0], "Tensor"))
    if "Tensor" in kind:
        return site.tensor(index)
    if "int" in kind or "SymInt" in kind:
        ints = site.demand_ints(index)
        return Ints(ints.items[:1], is_scalar=True)
    return site.call(torch.Tensor.item, site.tensor(index))


def _value(site: Site, kind: Any, value: Any) -> Any:
    """An attribute as the operator takes it."""
    if value == _EMPTY:
        return []
    text = str(kind)
    if isinstance(value, str) and value.startswith("torch."):
        found = getattr(torch, value.removeprefix("torch."), None)
        if found is None:
            raise Unsupported(f"torch has no {value}")
        if isinstance(found, torch.dtype) and site.emitter.precision.dtype is not None and found is torch.float32:
            return site.emitter.precision.dtype
        return found
    if isinstance(value, str) and "Device" in text:
        like = site.like()  # captured on another device than it will run on, perhaps
        return torch.device(value) if like is None else site.call(getattr, like, "device")
    if "bool" in text and isinstance(value, int):
        return bool(value)
    if "bool" in text and isinstance(value, (list, tuple)):
        return [bool(item) for item in value]
    return list(value) if isinstance(value, tuple) else value
