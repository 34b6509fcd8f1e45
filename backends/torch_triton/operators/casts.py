"""Types."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from xform.backends.torch_triton.functions import numbers, randomness
from xform.backends.torch_triton.lower.site import Ints, Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers

_FLOAT8 = (
    ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ,
)  # fmt: skip


@lowers("Cast")
def cast(site: Site) -> Any:
    return _cast(site, ir.DataType(site.attr("to")))


@lowers("CastLike")
def cast_like(site: Site) -> Any:
    dtype = site.dtype(1)
    if dtype is None:
        return site.call(numbers.cast_like, site.tensor(0), site.tensor(1))
    return _cast(site, dtype)


def _cast(site: Site, to: ir.DataType) -> Any:
    dtype = site.torch_dtype(to)
    have = site.dtype()
    if have is ir.DataType.STRING:
        raise Unsupported("torch has no strings")
    if to in (ir.DataType.INT64, ir.DataType.INT32) and site.has_ints(0):
        found = site.demand_ints(0)
        if found.known is None or to is ir.DataType.INT64:
            return found
    if have is not None and site.emitter.precision.of(have) is dtype:
        return site.tensor()
    if to in _FLOAT8:
        return site.call(numbers.cast_float8, site.tensor(), dtype, bool(site.attr("saturate", 1)))
    if site.is_float() and to.is_integer():
        return site.call(numbers.cast, site.tensor(), dtype)
    return site.call(torch.Tensor.to, site.tensor(), dtype)


@lowers("BitCast")
def bit_cast(site: Site) -> Any:
    return site.call(torch.Tensor.view, site.tensor(), site.torch_dtype(site.attr("to")))


@lowers("Identity")
def identity(site: Site) -> Any:
    value = site.value(0)
    if value is not None and isinstance(site.emitter.held(value), Ints):
        return site.emitter.held(value)
    return site.tensor()


@lowers("Constant")
def constant(site: Site) -> Any:
    value = site.node.outputs[0]
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise Unsupported("its value is no tensor")
    from xform.backends.torch_triton.lower.parameters import tensor_of

    torch_dtype = site.torch_dtype(tensor.dtype)
    return site.constant(tensor_of(tensor).to(torch_dtype), value.name or "constant")


@lowers("Dropout")
def dropout(site: Site) -> Any:
    training = site.known(2)
    if site.has(2) and (training is None or bool(training)):
        result = site.call(
            randomness.dropout,
            site.tensor(),
            site.tensor(2),
            site.operand(1) if site.has(1) else 0.5,
            site.attr("seed"),
        )
        return site.pick(result, 2)
    x = site.tensor()
    if not site.wants(1):
        return x
    return x, site.call(torch.ones_like, x, dtype=torch.bool)
