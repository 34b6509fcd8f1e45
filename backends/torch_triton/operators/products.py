"""Products of matrices."""

from __future__ import annotations

import operator
from typing import Any

import torch

from xform.backends.torch_triton.functions import products
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("MatMul")
def matmul(site: Site) -> Any:
    if not site.is_float():
        return site.call(products.integer_matmul, site.tensor(0), site.tensor(1))
    return site.call(operator.matmul, site.tensor(0), site.tensor(1))


@lowers("Gemm")
def gemm(site: Site) -> Any:
    a, b, c = site.tensor(0), site.tensor(1), site.optional(2)
    alpha, beta = site.attr("alpha", 1.0), site.attr("beta", 1.0)
    plain = site.is_float() and not site.attr("transA", 0) and alpha == 1 and (c is None or beta == 1)
    if plain and site.attr("transB", 0) and (c is None or site.rank(2) == 1):
        return site.call(torch.nn.functional.linear, a, b, c)
    left = site.call(torch.t, a) if site.attr("transA", 0) else a
    right = site.call(torch.t, b) if site.attr("transB", 0) else b
    if not site.is_float():
        return site.call(products.integer_gemm, left, right, c, alpha, beta)
    product = site.call(operator.matmul, left, right)
    product = product if alpha == 1 else site.call(operator.mul, product, alpha)
    if c is None:
        return product
    return site.call(operator.add, product, c if beta == 1 else site.call(operator.mul, c, beta))


@lowers("Einsum")
def einsum(site: Site) -> Any:
    equation = site.attr("equation").replace(" ", "")
    return site.call(torch.einsum, equation, *site.tensors())
