"""Reductions and running sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from xform.backends.torch_triton.functions import reductions
from xform.backends.torch_triton.lower.site import Ints, Site, axes_of, is_computed
from xform.backends.torch_triton.lower.table import lowers
from xform.backends.torch_triton.operators.arithmetic import UNSIGNED
from xform.backends.torch_triton.operators.shapes import product

_DIRECT: dict[str, Callable[..., Any]] = {
    "ReduceSum": torch.sum, "ReduceMean": torch.mean, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
}  # fmt: skip
_COMPOSED: dict[str, Callable[..., Any]] = {
    "ReduceProd": reductions.prod, "ReduceL1": reductions.l1, "ReduceL2": reductions.l2,
    "ReduceLogSum": reductions.log_sum, "ReduceSumSquare": reductions.sum_square,
}  # fmt: skip


@lowers(*_DIRECT, *_COMPOSED)
def reduce(site: Site) -> Any:
    kind, keepdims = site.node.op_type, bool(site.attr("keepdims", 1))
    if is_computed(site, 1):
        noop = bool(site.attr("noop_with_empty_axes", 0))
        return site.call(reductions.over, kind, site.tensor(), site.listed(1), keepdims, noop)
    axes = axes_of(site, 1)
    if not axes and site.attr("noop_with_empty_axes", 0):
        return _of_single_elements(site)
    if kind == "ReduceProd" and site.has_ints(0) and not keepdims:
        return Ints((product(site, list(site.demand_ints(0).items)),), is_scalar=True)
    x = site.tensor()
    rank = site.rank()
    if not axes and rank is None:
        return site.call(reductions.over, kind, x, [], keepdims, False)
    if not axes:
        axes = list(range(site.demand_rank()))
    elif rank is not None:
        axes = sorted(axis % rank for axis in axes)
    if kind in ("ReduceMax", "ReduceMin") and (site.dtype() is ir.DataType.BOOL or _may_be_empty(site, axes)):
        return site.call(reductions.extreme, x, list(axes), keepdims, kind == "ReduceMax")
    integer = not site.is_float()
    if (integer and kind in ("ReduceSum", "ReduceMean", "ReduceLogSumExp")) or site.dtype() in UNSIGNED:
        whole = {"ReduceSum": reductions.integer_sum, "ReduceMean": reductions.integer_mean}.get(kind)
        if whole is not None:
            return site.call(whole, x, list(axes), keepdims)
    function = _DIRECT.get(kind) or _COMPOSED[kind]
    if not axes:  # a scalar
        return _of_single_elements(site)
    return site.call(function, x, list(axes), keepdims)


def _may_be_empty(site: Site, axes: Sequence[int]) -> bool:
    """Whether a reduced dim is 0, or not known before the run."""
    shape = site.shape()
    return shape is None or not all(isinstance(shape[axis], int) and shape[axis] for axis in axes)


def _of_single_elements(site: Site) -> Any:
    """The reduction over no axes: each element alone."""
    x = site.tensor()
    match site.node.op_type:
        case "ReduceL1" | "ReduceL2":
            return site.call(torch.abs, x)
        case "ReduceLogSum":
            return site.call(torch.log, x)
        case "ReduceSumSquare":
            return site.call(torch.square, x)
    return x


@lowers("ArgMax", "ArgMin")
def arg_extreme(site: Site) -> Any:
    how = site.attr("axis", 0), bool(site.attr("keepdims", 1)), bool(site.attr("select_last_index", 0))
    return site.call(reductions.arg_extreme, site.tensor(), *how, site.node.op_type == "ArgMax")


@lowers("CumSum", "CumProd")
def cumulative(site: Site) -> Any:
    axis = site.demand_ints(1).items[0]
    how = bool(site.attr("exclusive", 0)), bool(site.attr("reverse", 0))
    if site.node.op_type == "CumSum" and how == (False, False) and site.is_float():
        return site.call(torch.cumsum, site.tensor(), axis)
    return site.call(reductions.cumulative, site.tensor(), axis, *how, site.node.op_type == "CumProd")
