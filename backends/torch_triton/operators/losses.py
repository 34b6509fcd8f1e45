"""Losses."""

from __future__ import annotations

from typing import Any

from xform.backends.torch_triton.functions import losses
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("NegativeLogLikelihoodLoss")
def negative_log_likelihood(site: Site) -> Any:
    how = site.attr("reduction", "mean"), site.attr("ignore_index")
    return site.call(losses.nll, site.tensor(0), site.tensor(1), site.optional(2), *how)


@lowers("SoftmaxCrossEntropyLoss")
def cross_entropy(site: Site) -> Any:
    how = site.attr("reduction", "mean"), site.attr("ignore_index")
    result = site.call(losses.cross_entropy, site.tensor(0), site.tensor(1), site.optional(2), *how)
    return site.pick(result, len(site.node.outputs))
