"""Outliers of activations migrated into weights (Xiao et al., "SmoothQuant", arXiv 2211.10438, section 4).

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),     X' = X / s,     W' = diag(s) W,     X' W' = X W

per input channel j, the largest |W_j| over all readers; the division moves into scale and bias of the norm in front.

Rules
1. `migrate`: for every norm whose ranges were measured and whose readers are all linear. Scales are at least 1e-5.
Left alone, with a remark: see `absorb_norm_affine`; a norm without ranges; readers in groups. Exact in float; what is
approximate is the quantization that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from xform.errors import UsageError
from xform.graph.values import Array
from xform.passes.normalize.move_into_readers import Change, MoveIntoReaders
from xform.passes.normalize.ranges import Ranges, load_ranges
from xform.passes.normalize.readers import LinearReader
from xform.patterns.norm import Norm
from xform.rewrite.passes import RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule

MIGRATED = "xform.migrated"
_SMALLEST = 1e-5


def migration_scales(activations: Array, weights: Array, alpha: float) -> Array:
    """s, float64 [C].

    Args:
        activations: Largest |X_j|, [C].
        weights: Largest |W_j| over all readers, [C].
        alpha: How much of the difficulty moves to the weights, 0 to 1.
    """
    x, w = np.maximum(activations, _SMALLEST), np.maximum(weights, _SMALLEST)
    scales: Array = np.maximum(x**alpha / w ** (1 - alpha), _SMALLEST)
    return scales


class Migrate(MoveIntoReaders):
    """Rule 1."""

    name = "migrate"

    def __init__(self, ranges: Ranges, alpha: float) -> None:
        self.ranges = ranges
        self.alpha = alpha

    def wanted(self, norm: Norm) -> Failure | None:
        if MIGRATED in norm.node.metadata_props:
            return QUIET
        if norm.output.name not in self.ranges:
            return Failure(f"there are no ranges for {norm.output.name}", (norm.node,))
        return None

    def change(self, norm: Norm, readers: Sequence[LinearReader]) -> Change | Failure:
        peak = self.ranges[norm.output.name or ""].peak
        if peak.shape != (norm.channels,) or not np.all(np.isfinite(peak)):
            return Failure(f"the ranges do not fit a norm of {norm.channels} channels", (norm.node,))
        weights = np.zeros(norm.channels)
        for reader in readers:
            peaks = reader.input_peaks()
            if isinstance(peaks, str):
                return Failure(peaks, (reader.linear.node,))
            weights = np.maximum(weights, peaks)
        s = migration_scales(peak, weights, self.alpha)
        return Change(s, np.zeros(norm.channels), norm.scale / s, norm.bias / s, ((MIGRATED, repr(self.alpha)),))


@dataclass(frozen=True)
class MigrateScales(RewritePass):
    """Large activation channels made smaller, and the weights that read them larger.

    Attributes:
        ranges: Measured ranges, or the file that holds them.
        alpha: How much of the difficulty moves to the weights; 0.5 suits most models, 0.8 those with strong outliers.
    """

    name: ClassVar[str] = "migrate_scales"
    ranges: str | Ranges = field(default="", hash=False)
    alpha: float = 0.5

    def rules(self) -> Sequence[Rule]:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be between 0 and 1, not {self.alpha}")
        return (Migrate(load_ranges(self.ranges), self.alpha),)
