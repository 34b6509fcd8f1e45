"""Writing by index."""

from __future__ import annotations

from typing import Any

from xform.backends.torch_triton.functions import scatter
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("Scatter", "ScatterElements")
def scatter_elements(site: Site) -> Any:
    how = site.attr("axis", 0), site.attr("reduction", "none")
    return site.call(scatter.scatter_elements, site.tensor(0), site.tensor(1), site.tensor(2), *how)


@lowers("ScatterND")
def scatter_nd(site: Site) -> Any:
    return site.call(scatter.scatter_nd, *site.tensors(), site.attr("reduction", "none"))


@lowers("TensorScatter")
def tensor_scatter(site: Site) -> Any:
    how = site.attr("axis", -2), site.attr("mode", "linear") == "circular"
    return site.call(scatter.tensor_scatter, site.tensor(0), site.tensor(1), site.optional(2), *how)
