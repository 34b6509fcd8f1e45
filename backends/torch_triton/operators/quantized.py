"""Quantization and integer products."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from xform.backends.torch_triton.functions import products, quantized
from xform.backends.torch_triton.lower.site import Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers
from xform.backends.torch_triton.operators.convolution import kernel_of, listed, padding, spatial_rank


@lowers("QuantizeLinear")
def quantize(site: Site) -> Any:
    wanted = site.attr("output_dtype", 0)
    kind = ir.DataType(wanted) if wanted else site.dtype(2) or ir.DataType.UINT8
    how = site.attr("axis", 1), site.attr("block_size", 0), site.torch_dtype(kind), bool(site.attr("saturate", 1))
    return site.call(quantized.quantize, site.tensor(0), site.tensor(1), site.optional(2), *how)


@lowers("DequantizeLinear")
def dequantize(site: Site) -> Any:
    wanted = site.attr("output_dtype", 0)
    kind = ir.DataType(wanted) if wanted else site.dtype(1) or ir.DataType.FLOAT
    how = site.attr("axis", 1), site.attr("block_size", 0), site.torch_dtype(kind)
    return site.call(quantized.dequantize, site.tensor(0), site.tensor(1), site.optional(2), *how)


@lowers("DynamicQuantizeLinear")
def dynamic_quantize(site: Site) -> Any:
    return site.pick(site.call(quantized.dynamic_quantize, site.tensor()), 3)


@lowers("MatMulInteger")
def matmul_integer(site: Site) -> Any:
    return site.call(products.matmul_integer, site.tensor(0), site.tensor(1), site.optional(2), site.optional(3))


@lowers("QLinearMatMul")
def quantized_matmul(site: Site) -> Any:
    return site.call(quantized.matmul, *site.tensors())


def _geometry(site: Site, weight: int) -> tuple[list[int], Any, list[int], int]:
    count = spatial_rank(site, weight)
    strides, dilations = listed(site, "strides", count, 1), listed(site, "dilations", count, 1)
    pads = padding(site, count, kernel_of(site, weight), strides, dilations)
    if isinstance(pads, str):
        raise Unsupported("auto_pad of a dynamic size")
    return strides, pads, dilations, site.attr("group", 1)


@lowers("ConvInteger")
def conv_integer(site: Site) -> Any:
    x, weight = site.tensor(0), site.tensor(1)
    return site.call(quantized.conv_integer, x, weight, site.optional(2), site.optional(3), *_geometry(site, 1))


@lowers("QLinearConv")
def quantized_conv(site: Site) -> Any:
    operands = [site.tensor(i) for i in range(8)]
    return site.call(quantized.conv, *operands, site.optional(8), *_geometry(site, 3))
