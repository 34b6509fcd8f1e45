"""Products of one input as one product with the weights side by side, where that is faster.

    x W1 + b1, x W2 + b2, ...  =  split(x [W1 W2 ...] + [b1 b2 ...])

Queries, keys and values; the gate of a gated unit and what it opens. A few rows fill a GPU only where columns are many,
and launches and readings of x are spared. The parts are views, which attention, `rotary_qk` and the kernels of rows
read by their strides; torch's norms make them dense first, and that is timed too. torch.compile packs nothing of its
own accord. The products are timed apart and packed on the sizes at hand; what was found is remembered as for kernels
(choose.py).

Packed weights and biases are parameters of their own, named after the first weight; what they were made of leaves the
module, unless something else reads it.

Left apart: products in branches and loops; those with products of something else between them, whose results would
wait long for their readers; results of the graph, which are given out dense; weights of a Gemm that are held
transposed; a weight that stands beside other ones elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Interpreter, Node

from xform.backends.base import Choice
from xform.backends.torch_triton.choose import GAIN, Decisions, Timer, device_of, naive_twins, outline
from xform.backends.torch_triton.kernels.common import is_call, origins, swap
from xform.backends.torch_triton.lower.parameters import drop_unused, register

Line = dict[str, Any]


@dataclass(frozen=True)
class _Product:
    """One product.

    Attributes:
        node: What computes it, with the bias if there is one.
        weight: Name of the weight [K, N] in the module.
        bias: Name of the bias [N], None without.
        dense: Whether a reader copies the result where it is a part of a wider one.
    """

    node: Node
    weight: str
    bias: str | None
    dense: bool


_Group = list[_Product]


def pack(module: GraphModule, inputs: list[Any], timer: Timer) -> list[Line]:
    """Pack the products of a module on its device, each group only if that is faster on these inputs.

    Args:
        inputs: In the order of the graph.
        timer: Seconds of one call.

    Returns:
        A line for each group: nodes, shape of x, widths, seconds of both ways (or why it `failed`), and whether it is
        packed.
    """
    groups = _groups(module)
    if not groups:
        return []
    measuring = _Measuring(module, groups, timer)
    with torch.no_grad():
        measuring.run(*inputs)
    measuring.decisions.save()
    packed: dict[tuple[str, ...], str] = {}
    for group in groups:
        if measuring.lines[group[0].node]["packed"]:
            _replace(module, group, packed)
    if packed:
        module.graph.eliminate_dead_code()
        drop_unused(module, module.graph)
        module.graph.lint()
        module.recompile()
    return list(measuring.lines.values())


def as_choices(lines: list[Line]) -> list[Choice]:
    """What `pack` decided, for `explain`."""
    return [Choice("packed_products", line["packed"], tuple(line["nodes"]), _told(line), "linear") for line in lines]


def _told(line: Line) -> str:
    if "failed" in line:
        return f"{len(line['widths'])} products stay apart: {line['failed']}"
    one, several = (f"{1e6 * line[key]:.1f} us" for key in ("packed_seconds", "separate_seconds"))
    count, shape = len(line["widths"]), "x".join(map(str, line["shape"]))
    gain = "" if line["packed"] else ", which gains nothing: they stay apart"
    return f"one product takes {one}, {count} of them {several} on {shape}{gain}"


def _groups(module: GraphModule) -> list[_Group]:
    """Products of one value with matrices of one dtype, one behind the other, no weight in two different groups."""
    runs: list[tuple[Any, _Group]] = []
    for node in module.graph.nodes:
        product = _product(node)
        if product is None:
            if runs and is_call(node, operator.matmul, F.linear) and node.args[0] is not runs[-1][0][0]:
                runs.append(((None, None), []))
            continue
        key = node.args[0], _held(module, product.weight).dtype
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(product)
    found: list[_Group] = []
    taken: dict[str, tuple[str, ...]] = {}
    for _, group in runs:
        names = tuple(product.weight for product in group)
        if len(set(names)) < 2 or len(set(names)) < len(names):
            continue
        if all(taken.get(name, names) == names for name in names):
            taken.update(dict.fromkeys(names, names))
            found.append(group)
    return found


def _product(node: Node) -> _Product | None:
    """`node` as a product with a weight of the module; None for others."""
    args: Any = node.args
    if is_call(node, operator.matmul):
        weight, bias = args[1], None
    elif is_call(node, F.linear) and is_call(args[1], torch.t):
        weight, bias = args[1].args[0], args[2] if len(args) > 2 else None
    else:
        return None
    if not (_is_weight(weight, 2) and isinstance(args[0], Node) and (bias is None or _is_weight(bias, 1))):
        return None
    if any(is_call(user, torch.ops.xform.bias_activation.default) for user in node.users):
        return None  # the bias behind it may still join it (`kernels.bias_activation.restore`)
    if any(user.op == "output" for user in node.users):
        return None
    return _Product(node, str(weight.target), None if bias is None else str(bias.target), _is_normalized(node))


def _is_normalized(node: Node) -> bool:
    """Whether one of torch's norms reads it, through views or not: queries and keys, head by head."""
    views = [user for user in node.users if user.target == "reshape" or is_call(user, torch.permute)]
    return any(is_call(user, F.layer_norm, F.rms_norm) for user in node.users) or any(map(_is_normalized, views))


def _is_weight(value: Any, rank: int) -> bool:
    if not (isinstance(value, Node) and value.op == "get_attr" and value.graph.owning_module is not None):
        return False
    held = _held(value.graph.owning_module, str(value.target))
    return isinstance(held, torch.Tensor) and held.dim() == rank


def _held(module: torch.nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(module)


def _tensors(module: torch.nn.Module, group: _Group) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases of a group."""
    weights = [_held(module, product.weight) for product in group]
    return weights, [None if product.bias is None else _held(module, product.bias) for product in group]


class _Measuring(Interpreter):
    """Runs a module, and times each group where its input is there."""

    def __init__(self, module: GraphModule, groups: list[_Group], timer: Timer) -> None:
        super().__init__(module)
        self.twins = naive_twins()
        self.groups = {group[0].node: group for group in groups}
        self.timer = timer
        self.decisions = Decisions(timer)
        self.lines: dict[Node, Line] = {}

    def run_node(self, n: Node) -> Any:
        """Decide, then run the products as they are."""
        group = self.groups.get(n)
        if group is not None:
            (x, *_), _ = self.fetch_args_kwargs_from_env(n)
            self.lines[n] = self._decided(group, x)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Kernels by torch: which of them run on this device is settled later."""
        return super().call_function(self.twins.get(target, target), args, kwargs)

    def _decided(self, group: _Group, x: torch.Tensor) -> Line:
        weights, biases = _tensors(self.module, group)
        dense = tuple(product.dense for product in group)
        key = " ".join(["packed_products", *map(outline, (x, *weights, *biases, dense))])
        found = self.decisions.of(f"{device_of(x)}, {key}", lambda: self._compare(x, weights, biases, dense))
        nodes = [name for product in group for name in origins(product.node)]
        widths = [int(weight.shape[1]) for weight in weights]
        return {"nodes": nodes, "shape": list(x.shape), "widths": widths, **found}

    def _compare(
        self,
        x: torch.Tensor,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor | None],
        dense: tuple[bool, ...],
    ) -> Line:
        widths = [weight.shape[1] for weight in weights]
        try:
            separate = self.timer(_separate, (x, weights, biases))
            joint = _side_by_side(weights), _in_a_row(weights, biases)
            together = self.timer(_packed, (x, *joint, widths, dense))
        except torch.OutOfMemoryError:
            return {"packed": False, "failed": "there is no memory on the device for a second copy of their weights"}
        return {"packed_seconds": together, "separate_seconds": separate, "packed": separate >= together * GAIN}


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x @ weight if bias is None else F.linear(x, weight.t(), bias)


def _separate(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _packed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, widths: list[int], dense: tuple[bool, ...]
) -> list[torch.Tensor]:
    parts = torch.split(_linear(x, weight, bias), widths, -1)
    return [part.contiguous() if copied else part for part, copied in zip(parts, dense, strict=True)]


def _side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """[K, N1 + N2 + ...], columns dense if they are in all of them."""
    if all(weight.stride(0) == 1 and weight.shape[1] > 1 for weight in weights):
        return torch.cat([weight.t() for weight in weights]).t()
    return torch.cat(list(weights), 1)


def _in_a_row(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[N1 + N2 + ...], zeros where a product has no bias; None where none has."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(weight.shape[1]) if bias is None else bias for weight, bias in pairs])


def _replace(module: GraphModule, group: _Group, packed: dict[tuple[str, ...], str]) -> None:
    """Put one product and a split in place of a group; `packed` names the matrices that are made already."""
    weights, biases = _tensors(module, group)
    sizes = [int(weight.shape[1]) for weight in weights]
    names = tuple(product.weight for product in group)
    if names not in packed:
        joint = _side_by_side(weights)
        packed[names] = register(module, f"{names[0]}_packed", joint, trainable=joint.is_floating_point())
        for weight, part in zip(weights, torch.split(joint, sizes, 1), strict=True):
            weight.data = part  # nothing is held twice, also where something else reads the weight
    bias = _in_a_row(weights, biases)
    first, graph = group[0].node, module.graph
    with graph.inserting_before(first):
        weight_node = graph.get_attr(packed[names])
        if bias is None:
            whole = graph.call_function(operator.matmul, (first.args[0], weight_node))
        else:
            name = register(module, f"{names[0]}_packed_bias", bias, trainable=True)
            turned = graph.call_function(torch.t, (weight_node,))
            whole = graph.call_function(F.linear, (first.args[0], turned, graph.get_attr(name)))
        whole.meta["onnx_node"] = ", ".join(name for product in group for name in origins(product.node))
        parts = graph.call_function(torch.split, (whole, sizes, -1))
        items = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(group))]
    for product, item in zip(group, items, strict=True):
        swap(module, product.node, item)
