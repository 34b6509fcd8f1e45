"""Random numbers: torch's own generator, seeded by the operator's seed where it has one."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from xform.backends.torch_triton.functions import randomness
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike")
def draw(site: Site) -> Any:
    kind = site.node.op_type
    normal = kind.startswith("RandomNormal")
    like = kind.endswith("Like")
    given = site.attr("dtype")
    dtype = ir.DataType(given) if given else (site.dtype() if like else None) or ir.DataType.FLOAT
    numbers = (
        (site.attr("mean", 0.0), site.attr("scale", 1.0)) if normal else (site.attr("low", 0.0), site.attr("high", 1.0))
    )
    reference = site.tensor() if like else site.like()
    shape = None if like else list(site.attr("shape"))
    return site.call(randomness.draw, reference, shape, normal, *numbers, site.torch_dtype(dtype), site.attr("seed"))


@lowers("Bernoulli")
def bernoulli(site: Site) -> Any:
    given = site.attr("dtype")
    dtype = ir.DataType(given) if given else site.dtype() or ir.DataType.FLOAT
    return site.call(randomness.bernoulli, site.tensor(), site.torch_dtype(dtype), site.attr("seed"))


@lowers("Multinomial")
def multinomial(site: Site) -> Any:
    dtype = site.torch_dtype(ir.DataType(site.attr("dtype", int(ir.DataType.INT32))))
    return site.call(randomness.multinomial, site.tensor(), site.attr("sample_size", 1), dtype, site.attr("seed"))
