"""Comparisons, logic, and choice."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from xform.backends.torch_triton.functions import unsigned
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers
from xform.backends.torch_triton.operators.arithmetic import UNSIGNED, operands

_COMPARE: dict[str, Callable[..., Any]] = {
    "Equal": operator.eq, "Greater": operator.gt, "GreaterOrEqual": operator.ge,
    "Less": operator.lt, "LessOrEqual": operator.le,
}  # fmt: skip
_LOGIC: dict[str, Callable[..., Any]] = {
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": operator.and_, "BitwiseOr": operator.or_, "BitwiseXor": operator.xor,
}  # fmt: skip


@lowers(*_COMPARE)
def compare(site: Site) -> Any:
    function = _COMPARE[site.node.op_type]
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.compare, function.__name__, site.tensor(0), site.tensor(1))
    return site.call(function, *operands(site))


@lowers(*_LOGIC)
def logic(site: Site) -> Any:
    function = _LOGIC[site.node.op_type]
    if site.dtype() in UNSIGNED:
        return site.call(unsigned.apply, function.__name__, site.tensor(0), site.tensor(1))
    return site.call(function, site.tensor(0), site.tensor(1))


@lowers("Where")
def where(site: Site) -> Any:
    left, right = (_chosen(site, index) for index in (1, 2))
    if not hasattr(left, "meta") and not hasattr(right, "meta"):
        left = site.tensor(1)
    return site.call(torch.where, site.tensor(0), left, right)


def _chosen(site: Site, index: int) -> Any:
    """A number where the result has the rank of the others anyway."""
    ranks = [site.rank(i) or 0 for i in range(3) if i != index]
    number = site.number(index)
    return number if number is not None and max(ranks) >= (site.rank(index) or 0) else site.tensor(index)
