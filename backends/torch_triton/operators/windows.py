"""Windows of signal processing."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from xform.backends.torch_triton.functions import windows
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers

_COEFFICIENTS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@lowers(*_COEFFICIENTS)
def window(site: Site) -> Any:
    dtype = site.torch_dtype(ir.DataType(site.attr("output_datatype", 1)))
    size = site.demand_ints(0).items[0]
    return site.call(
        windows.cosine_sum, size, _COEFFICIENTS[site.node.op_type], bool(site.attr("periodic", 1)), dtype, site.like()
    )
