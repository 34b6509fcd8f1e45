"""Fourier transforms."""

from __future__ import annotations

from typing import Any

from xform.backends.torch_triton.functions import signals
from xform.backends.torch_triton.lower.site import Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("DFT", since=20)
def fourier(site: Site) -> Any:
    length = site.demand_ints(1).items[0] if site.has(1) else None
    axis = site.demand_ints(2).items[0] if site.has(2) else -2
    how = bool(site.attr("onesided", 0)), bool(site.attr("inverse", 0))
    return site.call(signals.dft, site.tensor(), length, axis, *how)


@lowers("STFT")
def short_time_fourier(site: Site) -> Any:
    step = site.demand_ints(1).items[0]
    length = site.demand_ints(3).items[0] if site.has(3) else None
    how = bool(site.attr("onesided", 1))
    return site.call(signals.stft, site.tensor(), step, site.optional(2), length, how)


@lowers("MelWeightMatrix")
def mel_weights(site: Site) -> Any:
    import onnx_ir as ir

    counts = [site.demand_ints(i).items[0] for i in range(3)]
    edges = [site.call(float, site.tensor(i)) for i in (3, 4)]
    dtype = site.torch_dtype(ir.DataType(site.attr("output_datatype", 1)))
    return site.call(signals.mel_weights, *counts, *edges, dtype, site.like())
