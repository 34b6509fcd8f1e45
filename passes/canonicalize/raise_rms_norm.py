"""RMSNorm in any spelling to RMSNormalization (Zhang & Sennrich, arXiv 1910.07467; ONNX RMSNormalization-23).

Rules
1. `decomposed`: x / sqrt(mean(x^2) + e) over the last axes becomes RMSNormalization with a scale of ones.
2. `half`: Cast(RMSNormalization(Cast(x) to float32)) back to x's half-precision type becomes RMSNormalization of x
   itself, which keeps its statistics in float32 (stash_type 1).
3. `scale`: a constant factor of the normalized shape, or one that is no constant but has exactly that shape, is
   absorbed where nothing else reads the norm.
4. `simplified`: ONNX Runtime's SimplifiedLayerNormalization is the same operator under another name.

Preconditions: the normalized sizes are static; the reduction keeps dims. Exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import attribute, constant, rank_of, shape_of, used_once
from xform.passes.canonicalize.axes import reduction_axes, trailing_dims
from xform.passes.canonicalize.raise_layer_norm import FLOATS, fit_affine, stash_type
from xform.patterns import rms_norm
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.rule import QUIET, Failure, Rule


class Decomposed(Rule):
    """Rule 1."""

    name = "decomposed"
    concept = "rms_norm"
    pattern = rms_norm.RMS_NORM
    near_miss = 4

    def check(self, match: Match, context: PassContext) -> Failure | None:
        axes = reduction_axes(match["axes"], match["x"])
        if axes is None:
            return Failure("the rank of the input is unknown")
        dims = trailing_dims(match["x"], axes)
        if dims is None:
            return Failure(f"axes {axes} are not the last ones of {shape_of(match['x'])}, or their size is not static")
        if match["x"].dtype not in FLOATS:
            return Failure(f"element type {match['x'].dtype} is not a float that RMSNormalization takes")
        match.data["dims"] = dims
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x, dims = match["x"], match.data["dims"]
        assert x.dtype is not None
        ones = build.constant(np.ones(dims, dtype=x.dtype.numpy()), "rms_norm_scale")
        return build.op(
            "RMSNormalization",
            x,
            ones,
            axis=-len(dims),
            epsilon=match.numbers["epsilon"],
            stash_type=stash_type(x.dtype),
        )


_NORM = op("RMSNormalization", var("x"), var("scale"), name="norm")


class Half(Rule):
    """Rule 2."""

    name = "half"
    concept = "rms_norm"
    pattern = op("Cast", op("RMSNormalization", op("Cast", var("x")), var("scale"), name="norm"), name="back")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        x, norm = match["x"], match.node("norm")
        half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if x.dtype not in half or match.roots[0].dtype is not x.dtype or norm.outputs[0].dtype is not ir.DataType.FLOAT:
            return QUIET
        scale = constant(match["scale"])
        if scale is None or not used_once(norm.outputs[0]) or not bool(np.all(scale == 1)):
            return QUIET
        match.data["ones"] = scale
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x, norm = match["x"], match.node("norm")
        assert x.dtype is not None
        return build.op(
            "RMSNormalization",
            x,
            build.constant(match.data["ones"].astype(x.dtype.numpy()), "rms_norm_scale"),
            axis=attribute(norm, "axis", -1),
            epsilon=attribute(norm, "epsilon", 1e-5),
            stash_type=int(ir.DataType.FLOAT),
        )


class Scale(Rule):
    """Rule 3."""

    name = "scale"
    concept = "rms_norm"
    pattern = op("Mul", _NORM, var("other"))

    def check(self, match: Match, context: PassContext) -> Failure | None:
        norm, rank = match.node("norm"), rank_of(match["x"])
        scale, other = constant(match["scale"]), constant(match["other"])
        if rank is None or scale is None or not used_once(norm.outputs[0]):
            return QUIET
        if other is None:
            whole = shape_of(match["other"]) == tuple(scale.shape) and match["other"].dtype is match["scale"].dtype
            return None if whole and bool(np.all(scale == 1)) else QUIET
        axis = int(attribute(norm, "axis", -1)) % rank
        fitted = fit_affine(other, tuple(scale.shape), rank - axis)
        if fitted is None:
            return QUIET
        match.data["scale"] = scale.astype(np.float64) * fitted
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        norm, dtype = match.node("norm"), match["scale"].dtype
        assert dtype is not None
        folded = match.data.get("scale")
        return build.op(
            "RMSNormalization",
            match["x"],
            match["other"] if folded is None else build.folded(folded, dtype, "rms_norm_scale"),
            axis=attribute(norm, "axis", -1),
            epsilon=attribute(norm, "epsilon", 1e-5),
            stash_type=attribute(norm, "stash_type", 1),
        )


class Simplified(Rule):
    """Rule 4."""

    name = "simplified"
    concept = "rms_norm"
    pattern = op("SimplifiedLayerNormalization", var("x"), var("scale"), name="norm")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        others = match.node("norm").outputs[1:]
        return QUIET if any(other.uses() or other.is_graph_output() for other in others) else None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        norm = match.node("norm")
        return build.op(
            "RMSNormalization",
            match["x"],
            match["scale"],
            axis=attribute(norm, "axis", -1),
            epsilon=attribute(norm, "epsilon", 1e-5),
            stash_type=attribute(norm, "stash_type", 1),
        )


@dataclass(frozen=True)
class RaiseRMSNorm(RewritePass):
    """Raise every spelling of RMSNorm to RMSNormalization."""

    name: ClassVar[str] = "raise_rms_norm"

    def rules(self) -> Sequence[Rule]:
        return (Simplified(), Decomposed(), Half(), Scale())
