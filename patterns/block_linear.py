"""A linear map over channels spelled with reshapes, transposes and batched products.

Block-diagonal layers (BlockDense, BlockShuffle, Monarch matrices, grouped projections; Wei et al., "Building on
Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers", 2024) view the channels as blocks,
multiply each block by a matrix of its own, and permute. Whatever the spelling, the result is x D for one matrix D if
every step acts on each token alone.

That is proved by tracking what the axes are made of. A value's axes are lists of *atoms*, outer before inner; an atom
is a factor of an axis of the operand x and belongs to the tokens or to the channels:

    x           [batch, seq, 24]        batch | seq | b i          tokens: batch, seq; channels: b = 4, i = 6
    Reshape     [batch*seq, 4, 6]       batch seq | b | i
    Transpose   [4, batch*seq, 6]       b | batch seq | i
    MatMul      [4, batch*seq, 5]       b | batch seq | j          contracts i, a matrix for each b
    Transpose   [batch*seq, 4, 5]       batch seq | b | j
    Reshape     [batch, seq, 20]        batch | seq | b j          the tokens are as they were: x D with D [24, 20]

Reshapes split and join atoms, transposes permute axes; a product may contract and index channel atoms only. The matrix
comes from pushing the unit vectors of the channels, and zero for the shift, through the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from xform.graph import dims
from xform.graph.dims import Expr
from xform.graph.values import Array, attribute, constant, constant_tensor, is_op, shape_of

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
PRODUCTS = ("MatMul", "Einsum")


@dataclass(eq=False)
class Atom:
    """A factor of an axis. Atoms are compared by identity.

    Attributes:
        size: A number above 1, or a symbolic expression.
        channel: Whether it belongs to the channels.
        used: Whether a product contracts it, or has a matrix for each of its values.
    """

    size: Expr
    channel: bool
    used: bool = False


Axis = list[Atom]


def data_operand(node: ir.Node) -> int | None:
    """Which operand of a step is no constant; None if the node is no step of this kind."""
    if is_op(node, "Transpose", *VIEWS):
        return 0
    if not is_op(node, *ARITHMETIC, *PRODUCTS) or len(node.inputs) != 2:
        return None
    known = [constant_tensor(value) is not None for value in node.inputs]
    if known == [False, True]:
        return 0
    return 1 if known == [True, False] and not is_op(node, "Div") else None


def is_batched(node: ir.Node) -> bool:
    """Whether `node` is a product with a constant that holds several matrices."""
    side = data_operand(node) if is_op(node, *PRODUCTS) else None
    tensor = None if side is None else constant_tensor(node.inputs[1 - side])
    if tensor is None or len(tensor.shape) < 3:
        return False
    sizes = tensor.shape.numpy()
    return any(size > 1 for size in (sizes[:-2] if is_op(node, "MatMul") else sizes))


@dataclass
class Trace:
    """The axes of a value, followed from an operand x through steps, with the map itself where asked for.

    Attributes:
        tokens: The token axes of x, in its order.
        channels: The channel axes of x, as one list.
        axes: The axes of the value reached.
        matrix: [channels of x + 1, sizes of `order` ...] in float64: images of the unit vectors, and of zero; None
            where only the axes are followed.
        order: The channel atoms that the axes of `matrix` stand for.
    """

    tokens: list[Axis]
    channels: Axis
    axes: list[Axis]
    matrix: Array | None
    order: list[Atom] = field(default_factory=list)

    @staticmethod
    def start(x: ir.Value, channel_axes: int, *, numeric: bool) -> Trace | None:
        """At x, whose last `channel_axes` axes are the channels; None if their sizes or other dims are unknown."""
        shape = shape_of(x)
        if shape is None or len(shape) < channel_axes or any(d is None for d in shape):
            return None
        if not all(isinstance(d, int) and d > 0 for d in shape[len(shape) - channel_axes :]):
            return None
        axes: list[Axis] = []
        for index, dim in enumerate(shape):
            size: Expr = dim if isinstance(dim, int) else dims.parse(dim or "")
            axes.append([] if size == 1 else [Atom(size, index >= len(shape) - channel_axes)])
        first = len(shape) - channel_axes
        order = [atom for axis in axes[first:] for atom in axis]
        sizes = [_number(atom) for atom in order]
        matrix = None
        if numeric:
            count = int(np.prod(sizes, dtype=np.int64))
            matrix = np.concatenate([np.eye(count), np.zeros((1, count))]).reshape(count + 1, *sizes)
        return Trace([list(axis) for axis in axes[:first]], list(order), axes, matrix, order)

    def size(self) -> int:
        """The number of channels of x."""
        return _length(self.channels)

    def step(self, node: ir.Node) -> str | None:
        """Follow `node`; why that is not possible, or None. After a refusal the trace is of no further use."""
        side = data_operand(node)
        if side is None:
            return f"{node.op_type} is no step of a linear map"
        if is_op(node, "Transpose"):
            perm = attribute(node, "perm", None) or range(len(self.axes))[::-1]
            self.axes = [self.axes[i] for i in perm]
            return None
        if is_op(node, *VIEWS):
            return self._view(shape_of(node.outputs[0]))
        other = node.inputs[1 - side]
        weight = self._weight(other)
        if weight is None:
            return f"the constant of {node.op_type} is no float"
        if is_op(node, *ARITHMETIC):
            return self._arithmetic(node, side, weight)
        if is_op(node, "MatMul"):
            return self._matmul(side, weight)
        return self._einsum(str(attribute(node, "equation", "")), side, weight)

    def closed(self) -> int | None:
        """The number of output channels if the value is [tokens of x..., channels], however flattened, else None.

        Every channel of x must have gone through a product with a matrix of its own: axes that only stand beside the
        channels are tokens, and belong to another x.
        """
        if not all(atom.used for atom in self.channels):
            return None
        flat = [atom for axis in self.axes for atom in axis]
        before = [atom for axis in self.tokens for atom in axis]
        channels = flat[len(before) :]
        if flat[: len(before)] != before or not all(atom.channel for atom in channels):
            return None
        return int(np.prod([_number(atom) for atom in channels], dtype=np.int64))

    def dense(self) -> tuple[Array, Array]:
        """D [channels of x, output channels] and the shift [output channels] of x D + shift; `closed` must hold."""
        assert self.matrix is not None
        channels = [atom for axis in self.axes for atom in axis if atom.channel]
        ordered = self.matrix.transpose(0, *(1 + self.order.index(atom) for atom in channels))
        rows = ordered.reshape(self.matrix.shape[0], -1)
        return rows[:-1] - rows[-1:], rows[-1]

    def _weight(self, value: ir.Value | None) -> Array | None:
        """A constant in float64; where only the axes are followed, zeros of its shape that take no memory."""
        tensor = constant_tensor(value)
        if tensor is None or not tensor.dtype.is_floating_point():
            return None
        if self.matrix is None:
            return np.broadcast_to(np.float64(0), tensor.shape.numpy())
        array = constant(value)
        return None if array is None else array.astype(np.float64)

    # Views

    def _view(self, shape: Sequence[int | str | None] | None) -> str | None:
        if shape is None or any(d is None for d in shape):
            return "a view has an unknown shape"
        atoms = [atom for axis in self.axes for atom in axis]
        axes: list[Axis] = []
        for dim in shape:
            wanted: Expr = dim if isinstance(dim, int) else dims.parse(dim or "")
            axis: Axis = []
            while wanted != 1:
                if not atoms:
                    return "a view does not keep the number of elements"
                rest = dims.exact_div(wanted, atoms[0].size)
                if rest is not None:
                    wanted = rest
                    axis.append(atoms.pop(0))
                    continue
                inner = dims.exact_div(atoms[0].size, wanted)
                if inner is None:
                    return "a view mixes axes that have no common factor"
                atoms[0:1] = self._split(atoms[0], wanted, inner)
            axes.append(axis)
        if atoms:
            return "a view does not keep the number of elements"
        self.axes = axes
        return None

    def _split(self, atom: Atom, outer: Expr, inner: Expr) -> list[Atom]:
        parts = [Atom(outer, atom.channel, atom.used), Atom(inner, atom.channel, atom.used)]
        for axis in [*self.axes, *self.tokens, self.channels]:
            if atom in axis:
                at = axis.index(atom)
                axis[at : at + 1] = parts
        if atom.channel:
            at = self.order.index(atom)
            self.order[at : at + 1] = parts
            if self.matrix is not None:
                sizes = self.matrix.shape
                split = (*sizes[: at + 1], _number(parts[0]), _number(parts[1]), *sizes[at + 2 :])
                self.matrix = self.matrix.reshape(split)
        return parts

    # Arithmetic per channel

    def _arithmetic(self, node: ir.Node, side: int, weight: Array) -> str | None:
        if weight.ndim > len(self.axes):
            return f"the constant of {node.op_type} has more axes than its operand"
        spread = weight.reshape([1] * (len(self.axes) - weight.ndim) + list(weight.shape))
        for axis, size in zip(self.axes, spread.shape, strict=True):
            if size != 1 and (not all(atom.channel for atom in axis) or size != _length(axis)):
                return f"the constant of {node.op_type} differs from token to token, or adds channels"
        if self.matrix is None:
            return None
        varied = [atom for axis, size in zip(self.axes, spread.shape, strict=True) if size != 1 for atom in axis]
        values = spread.reshape([_number(atom) for atom in varied])
        places = [self.order.index(atom) for atom in varied]
        values = values.transpose(np.argsort(places))
        full = values.reshape([_number(atom) if atom in varied else 1 for atom in self.order])
        if is_op(node, "Mul", "Div"):
            self.matrix = self.matrix * (1 / full if is_op(node, "Div") else full)
            return None
        if is_op(node, "Sub"):
            if side == 1:
                self.matrix = -self.matrix
            else:
                full = -full
        self.matrix = self.matrix + full  # the image of each unit vector and that of zero are shifted alike
        return None

    # Products

    def _matmul(self, side: int, weight: Array) -> str | None:
        if weight.ndim < 2:
            return "a product with a vector"
        if side == 1:
            weight = weight.swapaxes(-1, -2)  # W x over the last axis but one is x W' over that axis
        contracted = len(self.axes) - 1 - side
        if contracted < 0 or len(self.axes) < 2:
            return "a product with a vector"
        missing = max(weight.ndim - len(self.axes), 0)
        axes = [*([] for _ in range(missing)), *self.axes]
        contracted += missing
        lead = [1] * (len(axes) - weight.ndim) + list(weight.shape[:-2])
        batch: list[int] = []
        for index, size in enumerate(lead):
            if size == 1:
                continue
            if not axes[index]:
                axes[index] = self._broadcast(size)
            if not _of_channels(axes[index], size):
                return "the matrix of a product differs from token to token"
            batch.append(index)
        self.axes = axes
        squeezed = weight.reshape([s for s in lead if s != 1] + list(weight.shape[-2:]))
        new = self._contract(batch, [contracted], squeezed)
        if isinstance(new, str):
            return new
        self.axes[contracted] = new
        return None

    def _einsum(self, equation: str, side: int, weight: Array) -> str | None:
        terms, _, result = equation.replace(" ", "").partition("->")
        labels = terms.split(",")
        if "." in equation or len(labels) != 2 or not result or len(set(result)) != len(result):
            return "an Einsum of another kind"
        x, w = labels[side], labels[1 - side]
        if len(set(x)) != len(x) or len(set(w)) != len(w) or len(x) != len(self.axes) or len(w) != weight.ndim:
            return "an Einsum of another kind"
        batch = [label for label in x if label in w and label in result]
        contracted = [label for label in x if label in w and label not in result]
        new = [label for label in w if label not in x]
        if any(label not in result for label in new) or any(label not in w + result for label in x) or not contracted:
            return "an Einsum that sums over one operand alone"
        for label in batch:
            if not _of_channels(self.axes[x.index(label)], weight.shape[w.index(label)]):
                return "the matrix of a product differs from token to token"
        arranged = weight.transpose([w.index(label) for label in (*batch, *contracted, *new)])
        sizes = [weight.shape[w.index(label)] for label in new]
        depth = int(np.prod([weight.shape[w.index(label)] for label in contracted], dtype=np.int64))
        arranged = arranged.reshape(*arranged.shape[: len(batch)], depth, -1)
        joined = self._contract([x.index(b) for b in batch], [x.index(c) for c in contracted], arranged)
        if isinstance(joined, str):
            return joined
        parts = {label: axis for label, axis in zip(x, self.axes, strict=True) if label in result}
        parts.update(zip(new, self._divide(joined, sizes), strict=True))
        self.axes = [parts[label] for label in result]
        return None

    def _divide(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """A new axis as several of these sizes."""
        pieces: list[Axis] = []
        for position, size in enumerate(sizes):
            rest = int(np.prod(sizes[position + 1 :], dtype=np.int64))
            if size == 1:
                pieces.append([])
            elif rest == 1:
                pieces.append(axis)
                axis = []
            else:
                outer, inner = self._split(axis[0], size, rest)
                pieces.append([outer])
                axis = [inner]
        return pieces

    def _broadcast(self, size: int) -> Axis:
        """A new channel axis along which everything is repeated."""
        atom = Atom(size, True)
        self.order.append(atom)
        if self.matrix is not None:
            self.matrix = np.repeat(self.matrix[..., None], size, axis=-1)
        return [atom]

    def _contract(self, batch: Sequence[int], contracted: Sequence[int], weight: Array) -> Axis | str:
        """Multiply by weight [batch..., depth, new]; the new axis, or why not."""
        inner = [atom for index in contracted for atom in self.axes[index]]
        outer = [atom for index in batch for atom in self.axes[index]]
        depth, new = weight.shape[-2:]
        if not all(atom.channel for atom in inner):
            return "a product mixes tokens"
        if _length(inner) != depth:
            return "a product broadcasts its operand"
        for used in (*inner, *outer):
            used.used = True
        atom = Atom(new, True)
        kept = [a for a in self.order if a not in inner and a not in outer]
        if self.matrix is not None:
            places = [1 + self.order.index(a) for a in (*outer, *kept, *inner)]
            blocks = _length(outer)
            moved = np.moveaxis(self.matrix, 0, -1) if False else self.matrix.transpose(*places, 0)
            columns = moved.reshape(blocks, -1, depth, self.matrix.shape[0]).transpose(0, 3, 1, 2)
            rows = columns.reshape(blocks, -1, depth)
            product = rows @ weight.reshape(blocks, depth, new)
            sizes = [_number(a) for a in (*outer, *kept)]
            shaped = product.reshape(blocks, self.matrix.shape[0], -1, new).transpose(1, 0, 2, 3)
            self.matrix = shaped.reshape(self.matrix.shape[0], *sizes, *([new] if new != 1 else []))
        self.order = [*outer, *kept, *([atom] if new != 1 else [])]
        return [atom] if new != 1 else []


def _number(atom: Atom) -> int:
    assert isinstance(atom.size, int)  # channel atoms come from static dims
    return atom.size


def _length(axis: Axis) -> int:
    return int(np.prod([_number(atom) for atom in axis], dtype=np.int64))


def _of_channels(axis: Axis, size: int) -> bool:
    return all(atom.channel for atom in axis) and _length(axis) == size
