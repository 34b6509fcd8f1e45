"""Sampling of images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from xform.backends.torch_triton.functions import images, resize
from xform.backends.torch_triton.lower.site import Ints, Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers


@lowers("Resize", since=11)
def resize_(site: Site) -> Any:
    axes = site.attr("axes")
    rank = site.demand_rank()
    axes = [axis % rank for axis in axes] if axes is not None else list(range(rank))
    sizes = site.listed(3)
    scales: Any = None
    if sizes is None:
        known = site.known(2)
        scales = site.call(resize.listed, site.tensor(2)) if known is None else [float(s) for s in known]
    mode = site.attr("mode", "nearest")
    settled = isinstance(sizes, Ints) or isinstance(scales, list)
    native = _native(site, mode, axes, rank, sizes, scales) if settled else None
    if native is not None:
        return native
    options: dict[str, Any] = {
        "mode": mode,
        "transformation": site.attr("coordinate_transformation_mode", "half_pixel"),
        "rounding": site.attr("nearest_mode", "round_prefer_floor"),
        "cubic": site.attr("cubic_coeff_a", -0.75),
        "exclude_outside": bool(site.attr("exclude_outside", 0)),
        "antialias": bool(site.attr("antialias", 0)),
        "policy": site.attr("keep_aspect_ratio_policy", "stretch"),
        "outside": site.attr("extrapolation_value", 0.0),
    }
    roi = None
    if options["transformation"] == "tf_crop_and_resize":
        roi = site.call(resize.listed, site.tensor(1))
    return site.call(resize.resize, site.tensor(), sizes, scales, axes, roi, **options)


def _native(site: Site, mode: str, axes: list[int], rank: int, sizes: Ints | None, scales: Any) -> Any:
    """torch's own interpolation, where it means the same; None where not."""
    if rank != 4 or site.attr("antialias", 0) or site.attr("exclude_outside", 0):
        return None
    if site.attr("keep_aspect_ratio_policy", "stretch") != "stretch" or not site.is_float():
        return None
    how = site.attr("coordinate_transformation_mode", "half_pixel")
    align = {"half_pixel": False, "align_corners": True}.get(how)
    if mode == "nearest":
        if (how, site.attr("nearest_mode", "round_prefer_floor")) != ("asymmetric", "floor"):
            return None
    elif align is None or (mode == "cubic" and site.attr("cubic_coeff_a", -0.75) != -0.75):
        return None
    if scales is not None:
        factors = dict(zip(axes, scales, strict=True))
        if factors.get(0, 1.0) != 1 or factors.get(1, 1.0) != 1:
            return None
        if any(factors.get(axis, 1.0) != int(factors.get(axis, 1.0)) for axis in (2, 3)):
            return None  # a fractional scale maps places by the scale itself, an integer one also by the sizes
        target = {"scale_factor": [factors.get(2, 1.0), factors.get(3, 1.0)]}
    else:
        assert sizes is not None
        given = dict(zip(axes, sizes.items, strict=True))
        own = site.shape() or (None,) * 4
        if any(
            given.get(axis, own[axis]) != own[axis] or not isinstance(own[axis], int | str)
            for axis in (0, 1)
            if axis in given
        ):
            return None
        if 2 not in given or 3 not in given:
            return None
        target = {"size": [given[2], given[3]]}
    name = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}[mode]
    options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": align}
    return site.call(F.interpolate, site.tensor(), mode=name, **target, **options)


@lowers("Upsample", since=7)
def upsample(site: Site) -> Any:
    known = site.known(1)
    if known is None:
        raise Unsupported("its scales are computed from data")
    return site.call(
        resize.resize, site.tensor(), None, [float(s) for s in known], list(range(len(known))), None,
        mode=site.attr("mode", "nearest"), transformation="asymmetric", rounding="floor", cubic=-0.75,
        exclude_outside=False, antialias=False, policy="stretch", outside=0.0,
    )  # fmt: skip


@lowers("GridSample", since=16)
def grid_sample(site: Site) -> Any:
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(site.attr("mode", "linear"), site.attr("mode", "linear"))
    padding, align = site.attr("padding_mode", "zeros"), bool(site.attr("align_corners", 0))
    rank = site.demand_rank()
    if (rank == 4 and mode != "nearest") or (rank == 5 and mode == "linear"):
        name = "bicubic" if mode == "cubic" else "bilinear"
        return site.call(F.grid_sample, site.tensor(0), site.tensor(1), name, padding, align)
    if mode == "cubic":
        raise Unsupported(f"cubic sampling over {rank - 2} axes")
    return site.call(images.grid_sample, site.tensor(0), site.tensor(1), mode, padding, align)


@lowers("AffineGrid")
def affine_grid(site: Site) -> Any:
    return site.call(images.affine_grid, site.tensor(), site.demand_ints(1), bool(site.attr("align_corners", 0)))


@lowers("RoiAlign", since=10)
def roi_align(site: Site) -> Any:
    x, boxes, batches = (site.tensor(i) for i in range(3))
    return site.call(
        images.roi_align, x, boxes, batches, site.attr("output_height", 1), site.attr("output_width", 1),
        site.attr("sampling_ratio", 0), site.attr("spatial_scale", 1.0), site.attr("mode", "avg") == "max",
        site.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel",
    )  # fmt: skip


@lowers("CenterCropPad")
def center_crop_pad(site: Site) -> Any:
    axes = site.attr("axes")
    return site.call(images.center_crop_pad, site.tensor(), site.demand_ints(1), None if axes is None else list(axes))
