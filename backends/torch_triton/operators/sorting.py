"""TopK and NonMaxSuppression."""

from __future__ import annotations

from typing import Any

from xform.backends.torch_triton.functions import sorting
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("TopK")
def top_k(site: Site) -> Any:
    how = site.attr("axis", -1), bool(site.attr("largest", 1)), bool(site.attr("sorted", 1))
    result = site.call(sorting.top_k, site.tensor(), site.demand_ints(1).items[0], *how)
    return site.pick(result, 2)


@lowers("NonMaxSuppression")
def non_max_suppression(site: Site) -> Any:
    bounds = [site.optional(i) for i in (2, 3, 4)]
    return site.call(
        sorting.non_max_suppression, site.tensor(0), site.tensor(1), *bounds, bool(site.attr("center_point_box", 0))
    )
