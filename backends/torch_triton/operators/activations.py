"""Activations, softmax and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from xform.backends.torch_triton.functions import activations, numbers
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers

_PLAIN: dict[str, Callable[..., Any]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Softsign": F.softsign, "Selu": F.selu,
    "Mish": F.mish, "HardSwish": F.hardswish,
}  # fmt: skip


@lowers(*_PLAIN)
def plain(site: Site) -> Any:
    if site.node.op_type == "Selu" and (site.attr("alpha") is not None or site.attr("gamma") is not None):
        return site.call(
            activations.selu,
            site.tensor(),
            site.attr("alpha", 1.67326319217681884765625),
            site.attr("gamma", 1.05070102214813232421875),
        )
    return site.call(_PLAIN[site.node.op_type], site.tensor())


@lowers("Softplus")
def softplus(site: Site) -> Any:
    # log(1 + e^x) everywhere; F.softplus is linear beyond its threshold
    return site.call(torch.logaddexp, site.tensor(), site.call(torch.zeros_like, site.tensor()))


@lowers("Gelu")
def gelu(site: Site) -> Any:
    if site.attr("approximate", "none") == "none":
        return site.call(activations.gelu, site.tensor())
    return site.call(F.gelu, site.tensor(), approximate=site.attr("approximate"))


@lowers("Swish")
def swish(site: Site) -> Any:
    alpha = site.attr("alpha", 1.0)
    return site.call(F.silu, site.tensor()) if alpha == 1 else site.call(activations.swish, site.tensor(), alpha)


@lowers("Elu")
def elu(site: Site) -> Any:
    return site.call(F.elu, site.tensor(), site.attr("alpha", 1.0))


@lowers("Celu")
def celu(site: Site) -> Any:
    return site.call(F.celu, site.tensor(), site.attr("alpha", 1.0))


@lowers("LeakyRelu")
def leaky_relu(site: Site) -> Any:
    return site.call(F.leaky_relu, site.tensor(), site.attr("alpha", 0.01))


@lowers("PRelu")
def parametric_relu(site: Site) -> Any:
    return site.call(activations.prelu, site.tensor(0), site.tensor(1))


@lowers("ThresholdedRelu")
def thresholded_relu(site: Site) -> Any:
    return site.call(numbers.thresholded, site.tensor(), site.attr("alpha", 1.0))


@lowers("HardSigmoid")
def hard_sigmoid(site: Site) -> Any:
    return site.call(activations.hard_sigmoid, site.tensor(), site.attr("alpha", 0.2), site.attr("beta", 0.5))


@lowers("Shrink")
def shrink(site: Site) -> Any:
    return site.call(numbers.shrink, site.tensor(), site.attr("lambd", 0.5), site.attr("bias", 0.0))


@lowers("Softmax", since=13)
def softmax(site: Site) -> Any:
    return site.call(torch.softmax, site.tensor(), site.attr("axis", -1))


@lowers("LogSoftmax", since=13)
def log_softmax(site: Site) -> Any:
    return site.call(torch.log_softmax, site.tensor(), site.attr("axis", -1))


@lowers("Hardmax", since=13)
def hardmax(site: Site) -> Any:
    return site.call(activations.hardmax, site.tensor(), site.attr("axis", -1))
