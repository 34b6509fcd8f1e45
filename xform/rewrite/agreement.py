"""What every replacement must share with the value that it replaces, whatever the rule: dtype, rank, and sizes.

A rule proves its algebra. It easily forgets that a constant of shape [1, 1, 1] gives its product three axes. So the
rewriter compares what inference found for the new value with what is known of the old one, before anything is changed:

    dtypes   equal, where both are known
    ranks    equal, where both are known. A new value whose rank cannot be inferred although the ranks of its operands
             are known is refused; where no inference knows the operator (another domain than ONNX's), or an operand's
             rank is unknown, the new value takes over the rank of what it replaces
    sizes    numbers are equal; a 1 does not stand for a named dim, nor a named dim for a 1. Two names, and a name and
             a larger number, do not contradict each other: exporters give one size several names.

Where the rank of an operand is not known, inference cannot tell that a constant of shape [1] gives a scalar an axis. A
match that holds such a constant beside such an operand is refused (`uncertain_rank`).

A new operator must also have a kernel for its dtype where every replaced one had (`xform.graph.kernels`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from xform.graph.kernels import computing_type, has_kernel
from xform.graph.shapes import GENERATED
from xform.graph.values import ONNX_DOMAINS, Dim, display_name, is_constant, shape_of
from xform.target import Target

_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "Where", "PRelu", "Equal",
                 "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Expand")  # fmt: skip


def disagreement(old: ir.Value, new: ir.Value) -> str | None:
    """Why `new` may not stand for `old`, in words; None if nothing that is known speaks against it."""
    if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
        return f"the replacement would be {new.dtype.name}, {_name(old)} is {old.dtype.name}"
    before, after = shape_of(old), shape_of(new)
    if before is None:
        return None
    if after is None:
        if not _derivable(new):
            return None
        return f"the rank of the replacement for {_name(old)} is not known"
    if len(before) != len(after):
        return f"the replacement would have {len(after)} axes, {_name(old)} has {len(before)}"
    if any(_contradict(a, b) for a, b in zip(before, after, strict=True)):
        return f"the replacement would have shape {_spelled(after)}, {_name(old)} has {_spelled(before)}"
    return None


def uncertain_rank(replaced: Iterable[ir.Node]) -> str | None:
    """Which constant among the replaced nodes may give an operand of unknown rank more axes than it has, or None.

    A vector of several numbers is not asked about: a rule keeps it as an operand, or has seen a channel axis.
    """
    for node in replaced:
        if node.domain not in ONNX_DOMAINS or node.op_type not in _BROADCASTING:
            continue
        unknown = next((v for v in node.inputs if v is not None and v.shape is None and not is_constant(v)), None)
        wide = next((v for v in node.inputs if is_constant(v) and _adds_axes(v)), None)
        if unknown is not None and wide is not None:
            constant = f"{_name(wide)} of shape {_spelled(shape_of(wide) or ())}"
            return f"the rank of {_name(unknown)} is not known, and {constant} may give the result more axes"
    return None


def _adds_axes(value: ir.Value | None) -> bool:
    shape = shape_of(value)
    return shape is not None and (len(shape) > 1 or shape == (1,))


def lost_kernel(replaced: Iterable[ir.Node], added: Iterable[ir.Node], target: Target) -> str | None:
    """Which new operator ONNX Runtime could not run on the CPU although it could run all that is replaced, or None."""
    if target.kind != "cpu":
        return None
    missing = next((node for node in added if not has_kernel(node)), None)
    if missing is None or not all(has_kernel(node) for node in replaced):
        return None
    dtype = computing_type(missing)
    return f"ONNX Runtime has no {missing.op_type} in {dtype.name if dtype else 'this dtype'} on the CPU"


def _derivable(value: ir.Value) -> bool:
    """Whether inference has all that it needs to tell the rank of `value`."""
    node = value.producer()
    return (
        node is not None and node.domain in ONNX_DOMAINS and all(v is None or v.shape is not None for v in node.inputs)
    )


def _contradict(a: Dim, b: Dim) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    return (a == 1 and _named(b)) or (b == 1 and _named(a))


def _named(dim: Dim) -> bool:
    return isinstance(dim, str) and not dim.startswith(GENERATED)


def _spelled(shape: Sequence[Dim]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _name(value: ir.Value) -> str:
    node = value.producer()
    return value.name or (display_name(node) if node is not None else "the value")
