"""LayerNorm in any spelling to LayerNormalization (Ba et al., arXiv 1607.06450; ONNX LayerNormalization-17).

Rules
1. `decomposed`: d / sqrt(mean(d^2) + e) with d = x - mean(x) over the last axes becomes LayerNormalization with a
   scale of ones.
2. `channel_first`: the same over axis 1 of a rank-4 x becomes Transpose, LayerNormalization over the last axis,
   Transpose.
3. `scale` and `bias`: a constant factor or summand of the normalized shape after a LayerNormalization that nothing
   else reads is absorbed: (s*n + b)*w + c = (s w)*n + (b w + c), in float64.

Preconditions: both reductions run over the same constant axes and keep dims; the normalized sizes are static.
Only rounding differs (the operator may accumulate in another order), so the pass is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, rank_of, shape_of, used_once
from xform.passes.canonicalize.axes import reduction_axes, trailing_dims
from xform.patterns import layer_norm
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import maybe, op, var
from xform.rewrite.rule import QUIET, Failure, Rule

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def stash_type(dtype: ir.DataType | None) -> int:
    """Precision of the statistics: the graph computed them in x's own dtype where that is float32 or wider."""
    return int(ir.DataType.DOUBLE) if dtype is ir.DataType.DOUBLE else int(ir.DataType.FLOAT)


def same_axes(match: Match, first: str, second: str) -> tuple[int, ...] | Failure:
    """The axes that two bound reductions share, or why they do not."""
    x = match["x"]
    a, b = reduction_axes(match[first], x), reduction_axes(match[second], x)
    if a is None or b is None:
        return Failure("the rank of the input is unknown")
    return a if a == b else Failure(f"mean over axes {a} but variance over axes {b}")


class Decomposed(Rule):
    """Rule 1."""

    name = "decomposed"
    concept = "layer_norm"
    pattern = layer_norm.LAYER_NORM
    near_miss = 5

    def check(self, match: Match, context: PassContext) -> Failure | None:
        axes = same_axes(match, "mean_axes", "variance_axes")
        if isinstance(axes, Failure):
            return axes
        dims = trailing_dims(match["x"], axes)
        if dims is None:
            return Failure(f"axes {axes} are not the last ones of {shape_of(match['x'])}, or their size is not static")
        if match["x"].dtype not in FLOATS:
            return Failure(f"element type {match['x'].dtype} is not a float that LayerNormalization takes")
        match.data["dims"] = dims
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return _layer_norm(match, build, match["x"], match.data["dims"])


class ChannelFirst(Rule):
    """Rule 2."""

    name = "channel_first"
    concept = "layer_norm"
    pattern = layer_norm.LAYER_NORM

    def check(self, match: Match, context: PassContext) -> Failure | None:
        axes = same_axes(match, "mean_axes", "variance_axes")
        shape = shape_of(match["x"])
        if isinstance(axes, Failure):
            return axes
        if axes != (1,) or shape is None or len(shape) != 4 or not isinstance(shape[1], int):
            return Failure(f"axes {axes} of {shape} are neither the last ones nor the channels of a 4-D input")
        match.data["dims"] = (shape[1],)
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        last = build.op("Transpose", match["x"], perm=[0, 2, 3, 1])
        return build.op("Transpose", _layer_norm(match, build, last, match.data["dims"]), perm=[0, 3, 1, 2])


def _layer_norm(match: Match, build: Builder, x: ir.Value, dims: tuple[int, ...]) -> ir.Value:
    assert x.dtype is not None
    ones = build.constant(np.ones(dims, dtype=x.dtype.numpy()), "layer_norm_scale")
    return build.op(
        "LayerNormalization",
        x,
        ones,
        axis=-len(dims),
        epsilon=match.numbers["epsilon"],
        stash_type=stash_type(x.dtype),
    )


_NORM = op("LayerNormalization", var("x"), var("scale"), maybe(var("bias")), name="norm")


class _Absorb(Rule):
    """Rule 3: shared conditions."""

    concept = "layer_norm"

    def check(self, match: Match, context: PassContext) -> Failure | None:
        norm = match.node("norm")
        scale, bias, other = constant(match["scale"]), match.get("bias"), constant(match["other"])
        rank, dims = rank_of(match["x"]), shape_of(match["scale"])
        if not used_once(norm.outputs[0]) or scale is None or other is None or rank is None or dims is None:
            return QUIET
        if bias is not None and constant(bias) is None:
            return QUIET
        axis = int(attribute(norm, "axis", -1)) % rank
        fitted = fit_affine(other, tuple(scale.shape), rank - axis)
        if fitted is None:
            return QUIET
        match.data.update(scale=scale, other=fitted, bias=None if bias is None else constant(bias))
        return None

    def absorb(self, match: Match, build: Builder, scale: Array, bias: Array | None) -> ir.Value:
        norm, dtype = match.node("norm"), match["scale"].dtype
        assert dtype is not None
        new = [
            build.folded(a.astype(np.float64), dtype, f"layer_norm_{n}", summand=n == "bias") if a is not None else None
            for n, a in (("scale", scale), ("bias", bias))
        ]
        return build.op(
            "LayerNormalization",
            match["x"],
            *new,
            axis=attribute(norm, "axis", -1),
            epsilon=attribute(norm, "epsilon", 1e-5),
            stash_type=attribute(norm, "stash_type", 1),
        )


class Scale(_Absorb):
    """Rule 3, factor."""

    name = "scale"
    pattern = op("Mul", _NORM, var("other"))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        d = match.data
        bias = None if d["bias"] is None else d["bias"].astype(np.float64) * d["other"]
        return self.absorb(match, build, d["scale"].astype(np.float64) * d["other"], bias)


class Bias(_Absorb):
    """Rule 3, summand."""

    name = "bias"
    pattern = op("Add", _NORM, var("other"))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        d = match.data
        bias = d["other"] if d["bias"] is None else d["bias"].astype(np.float64) + d["other"]
        return self.absorb(match, build, d["scale"].astype(np.float64), bias)


def fit_affine(other: Array, dims: tuple[int, ...], normalized_rank: int) -> Array | None:
    """`other` broadcast to the normalized shape in float64; None where it also varies over other axes."""
    while other.ndim > normalized_rank and other.shape[0] == 1:
        other = other[0]
    if other.ndim > normalized_rank or other.dtype.kind not in "fV" or len(dims) > normalized_rank:
        return None
    try:
        return np.broadcast_to(other.astype(np.float64), dims)
    except ValueError:
        return None


@dataclass(frozen=True)
class RaiseLayerNorm(RewritePass):
    """Raise every spelling of LayerNorm to LayerNormalization."""

    name: ClassVar[str] = "raise_layer_norm"

    def rules(self) -> Sequence[Rule]:
        return (Decomposed(), ChannelFirst(), Scale(), Bias())
