"""What a lowering sees of its node: inputs as torch values or Python numbers, attributes, and calls to emit.

A value is held in one of two ways. Most are tensors: fx nodes. Shapes and what is computed from them are `Ints`:
lists of Python ints, or of fx nodes that are ints when the graph runs. So sizes never become tensors, dynamic dims
stay symbolic when the graph is traced, and no GPU is ever waited for to learn a shape. An `Ints` becomes a tensor
only where an operator needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from xform.backends.torch_triton.lower.dtypes import Precision
from xform.graph.values import Array, attribute, constant, constant_tensor, rank_of, shape_of

if TYPE_CHECKING:
    from xform.backends.torch_triton.lower.graph import GraphEmitter

Item = int | Node


@dataclass(frozen=True)
class Ints:
    """An int64 scalar or vector whose elements are Python ints, known now or when the graph runs."""

    items: tuple[Item, ...]
    is_scalar: bool = False

    @property
    def known(self) -> tuple[int, ...] | None:
        """The numbers, if all are known now."""
        found = tuple(item for item in self.items if isinstance(item, int))
        return found if len(found) == len(self.items) else None


class Unsupported(Exception):  # noqa: N818 - collected, and raised as one TargetError
    """This node cannot be written in torch, and why."""


class Site:
    """One node being lowered."""

    def __init__(self, node: ir.Node, emitter: GraphEmitter) -> None:
        self.node = node
        self.emitter = emitter
        self.is_wide = node in emitter.wide_nodes

    # --- what is known of the inputs ----------------------------------------------------------------------------

    def value(self, index: int) -> ir.Value | None:
        """Input `index`, None if it is omitted."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return self.value(index) is not None

    def wants(self, index: int) -> bool:
        """Whether anyone reads output `index`."""
        if index >= len(self.node.outputs):
            return False
        output = self.node.outputs[index]
        return bool(output.uses()) or output.is_graph_output()

    def rank(self, index: int = 0) -> int | None:
        """Rank of an input, None if unknown."""
        return rank_of(self.value(index))

    def demand_rank(self, index: int = 0) -> int:
        """Rank of an input. Raises Unsupported where it is unknown."""
        rank = self.rank(index)
        if rank is None:
            raise Unsupported(f"the rank of input {index} is unknown")
        return rank

    def shape(self, index: int = 0) -> tuple[int | str | None, ...] | None:
        """Shape of an input with static dims as ints."""
        return shape_of(self.value(index))

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """Element type of an input as declared, None if unknown."""
        value = self.value(index)
        return None if value is None else value.dtype

    def is_float(self, index: int = 0) -> bool:
        """Whether an input holds floats; unknown types count as floats."""
        dtype = self.dtype(index)
        return dtype is None or dtype.is_floating_point()

    def torch_dtype(self, dtype: ir.DataType | int) -> torch.dtype:
        """The dtype that stands for an ONNX type here. Raises Unsupported if torch has none."""
        precision = Precision() if self.is_wide else self.emitter.precision
        found = precision.of(ir.DataType(dtype))
        if found is None:
            raise Unsupported(f"torch has no {ir.DataType(dtype).name.lower()}")
        return found

    def known(self, index: int) -> Array | None:
        """The data of a constant input, else None."""
        return constant(self.value(index))

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute as plain Python."""
        return attribute(self.node, name, default)

    # --- the inputs as operands ---------------------------------------------------------------------------------

    def tensor(self, index: int = 0) -> Node:
        """Input `index` as a tensor."""
        value = self.value(index)
        if value is None:
            raise Unsupported(f"input {index} is missing")
        return self.emitter.wide_tensor(value) if self.is_wide else self.emitter.narrowed(value)

    def optional(self, index: int) -> Node | None:
        """Input `index` as a tensor, None if it is omitted."""
        return self.tensor(index) if self.has(index) else None

    def tensors(self, start: int = 0) -> list[Node]:
        """All inputs from `start` on as tensors."""
        return [self.tensor(i) for i in range(start, len(self.node.inputs))]

    def operand(self, index: int) -> Any:
        """Input `index` as a Python number if it is a constant of one element, else as a tensor.

        A number has no rank, so a constant of more axes than the other inputs stays a tensor: it raises their rank.
        """
        number = self.number(index)
        others = (self.rank(i) or 0 for i in range(len(self.node.inputs)) if i != index and self.has(i))
        if number is None or (self.rank(index) or 0) > max(others, default=0):
            return self.tensor(index)
        return number

    def number(self, index: int) -> int | float | bool | None:
        """The Python number of an anonymous constant with one element, else None."""
        value = self.value(index)
        tensor = constant_tensor(value)
        if value is None or tensor is None or tensor.size != 1 or self.emitter.is_parameter(value):
            return None
        if value.dtype is None or value.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            return None
        array = tensor.numpy().reshape(())
        number: int | float | bool = array.item() if array.dtype.kind in "biuf" else float(array.astype(np.float64))
        return number if self.is_wide else self.emitter.representable(number, value.dtype)

    def ints(self, index: int) -> Ints | None:
        """Input `index`, an int vector or scalar, as Python ints; None if it is omitted.

        Raises:
            Unsupported: It is computed from data and its length is unknown.
        """
        value = self.value(index)
        return None if value is None else self.emitter.ints(value)

    def demand_ints(self, index: int) -> Ints:
        """As `ints`, for an input that must be there."""
        found = self.ints(index)
        if found is None:
            raise Unsupported(f"input {index} is missing")
        return found

    def listed(self, index: int) -> Any:
        """Input `index`, an int vector of any length, as what becomes a Python list; None if it is omitted."""
        if not self.has(index):
            return None
        shape = self.shape(index)
        if self.has_ints(index) or shape == () or (shape is not None and len(shape) == 1 and isinstance(shape[0], int)):
            return self.ints(index)
        return self.call(torch.Tensor.tolist, self.tensor(index))

    def known_ints(self, index: int) -> list[int] | None:
        """Input `index` as ints known now; None if it is omitted. Raises Unsupported if they are not known."""
        found = self.ints(index)
        if found is None:
            return None
        if found.known is None:
            raise Unsupported(f"input {index} has to be known before the model runs")
        return list(found.known)

    def has_ints(self, index: int) -> bool:
        """Whether input `index` is held as Python ints already, or is an int constant of rank 0 or 1."""
        value = self.value(index)
        return value is not None and self.emitter.holds_ints(value)

    # --- emitting -----------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call in the torch graph; `Ints` among the arguments become lists or ints."""
        return self.emitter.call(function, *map(_plain, args), **{name: _plain(arg) for name, arg in kwargs.items()})

    def once(self, function: Callable[..., Any], *args: Node) -> Node:
        """As `call`, but once for the same arguments: what many layers ask of one mask."""
        key = (function, *args)
        if key not in self.emitter.made_once:
            self.emitter.made_once[key] = self.call(function, *args)
        return self.emitter.made_once[key]

    def pick(self, result: Node, count: int) -> tuple[Node, ...]:
        """The first `count` elements of a call that gives a tuple."""
        import operator

        return tuple(self.call(operator.getitem, result, i) for i in range(count))

    def like(self) -> Node | None:
        """A tensor whose device new tensors are made on."""
        return self.emitter.reference

    def constant(self, array: Array | torch.Tensor, name: str) -> Node:
        """A new buffer."""
        return self.emitter.buffer(array, name)


def _plain(argument: Any) -> Any:
    if isinstance(argument, Ints):
        return argument.items[0] if argument.is_scalar else list(argument.items)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_plain(item) for item in argument)
    return argument


def axes_of(site: Site, index: int, name: str = "axes") -> Sequence[int] | None:
    """Axes from an input (opset 13 or 18 on) or an attribute; None if absent."""
    found = site.known_ints(index)
    return site.attr(name) if found is None else found


def is_computed(site: Site, index: int) -> bool:
    """Whether an input of ints is known only when the graph runs."""
    if not site.has(index):
        return False
    return not site.has_ints(index) or site.demand_ints(index).known is None
