"""Scale and bias of a norm absorbed by the linear maps that read it.

    W (g n + b) + d = (W diag(g)) n + (W b + d)

Rules
1. `absorb`: if every reader of a LayerNormalization or RMSNormalization over the last axis is a linear map (packed or
   separate query, key and value projections, a feed-forward layer, a convolution), over views, picked tokens or a mean
   over positions, scale and bias move into them, in float64. The norm that is left has a scale of ones, no bias, and
   the metadata `xform.identity_affine`, so that backends may leave the scale out.
Left alone, with a remark: a reader that is not linear, or an output of the graph; a bias and a convolution that pads
with zeros; a fold that overflows the weight's type; a bias that would cost more in the readers than in the norm.

The pass is exact. Source: the folding of norms that quantization and slicing methods begin with, such as Ashkboos et
al., "SliceGPT", arXiv 2401.15024, section 3.2; for means over positions, SLAB, arXiv 2405.11582.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xform.graph.values import display_name
from xform.passes.normalize.move_into_readers import Change, MoveIntoReaders
from xform.passes.normalize.readers import LinearReader
from xform.patterns.norm import Norm
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule


class Absorb(MoveIntoReaders):
    """Rule 1."""

    name = "absorb"

    def wanted(self, norm: Norm) -> Failure | None:
        return QUIET if norm.is_identity() else None

    def change(self, norm: Norm, readers: Sequence[LinearReader]) -> Change:
        return Change(norm.scale, norm.bias, np.ones(norm.channels), np.zeros(norm.channels))

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """A bias costs one Add over its channels. In a LayerNormalization it is free, as an Add of its own it is not:
        the channels of the Adds that readers without a bias would need must not be more than those of the Add saved.
        """
        norm: Norm = match.data["norm"]
        needy = [r for r in match.data["readers"] if r.needs_bias(norm.bias)]
        cost = sum(reader.linear.output_channels() for reader in needy)
        saved = norm.channels if norm.add is not None else 0
        if cost <= saved:
            return None
        nodes = tuple(reader.linear.node for reader in needy)
        return Failure(
            f"{', '.join(display_name(n) for n in nodes[:3])} would need a bias of {cost} channels in all, to save "
            f"{saved} of the norm",
            nodes,
        )


@dataclass(frozen=True)
class AbsorbNormAffine(RewritePass):
    """Norm scales and biases moved into the linear maps that read them."""

    name: ClassVar[str] = "absorb_norm_affine"

    def rules(self) -> Sequence[Rule]:
        return (Absorb(),)
