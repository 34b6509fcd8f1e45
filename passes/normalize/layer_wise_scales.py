"""One quantization scale per layer in place of one per channel, by the norm in front (Li et al., "RepQ-ViT", arXiv
2212.08254, section 3.2; "RepQuant", arXiv 2402.05628).

What a norm gives differs in range from channel to channel, so it wants a scale s and a zero point z per channel;
integer kernels want one of each, S and Z. With unsigned codes q = round(x / s) + z, take r = s / S and

    x' = x / r + S (z - Z)     so that     round(x' / S) + Z = round(x / s + z - Z) + Z = round(x / s) + z

The last step needs integer z and Z: the codes are then equal, not only close. The norm gives x' with scale g / r and
bias b / r - S (Z - z), and x = r x' + r S (Z - z) moves into the weights and biases of its readers.

Rules
1. `layer_wise`: for every norm whose ranges were measured and whose readers are all linear, s and z come from its
   ranges (asymmetric, `bits`), S is the mean of s, and Z the mean of z, rounded and brought among the codes. Scale and
   zero point stand in the norm's metadata, `xform.scale` and `xform.zero_point`, for the lowering to integers.
Left alone, with a remark: see `absorb_norm_affine`; and a norm without ranges. Exact in real numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from xform.graph.values import Array
from xform.passes.normalize.move_into_readers import Change, MoveIntoReaders
from xform.passes.normalize.ranges import ChannelRange, Ranges, load_ranges
from xform.passes.normalize.readers import LinearReader
from xform.patterns.norm import Norm
from xform.rewrite.passes import RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule

SCALE = "xform.scale"
ZERO_POINT = "xform.zero_point"
_SMALLEST = 1e-6  # of the largest scale: a channel that hardly moves must not blow the others up


@dataclass(frozen=True)
class Quantization:
    """q = clip(round(x / scale) + zero, 0, 2^bits - 1), per channel ([C]) or for all of them ([])."""

    scale: Array
    zero: Array
    bits: int

    def codes(self, x: Array) -> Array:
        """Codes of x [..., C] as int64; ties go to the even number."""
        codes: Array = np.clip(np.round(x / self.scale) + self.zero, 0, 2**self.bits - 1).astype(np.int64)
        return codes


def channel_wise(ranges: ChannelRange, bits: int) -> Quantization | None:
    """A scale and an integer zero point per channel that span its range; None where nothing varies."""
    width = ranges.high - ranges.low
    if not np.all(np.isfinite(width)) or not np.any(width > 0):
        return None
    scale = np.maximum(width, _SMALLEST * width.max()) / (2**bits - 1)
    return Quantization(scale, np.round(-ranges.low / scale), bits)


def layer_wise(channels: Quantization) -> Quantization:
    """One scale, the mean, and one zero point: the mean as an integer that is a code, rounded before it is used.

    Any integer keeps the codes; kernels take none that is outside 0 to 2^bits - 1.
    """
    zero = np.clip(np.round(channels.zero.mean()), 0, 2**channels.bits - 1)
    return Quantization(np.asarray(channels.scale.mean()), zero, channels.bits)


def reparameterize(norm: Norm, ranges: ChannelRange, bits: int) -> Change | None:
    """The change of a norm and its readers; None where its range is empty."""
    channels = channel_wise(ranges, bits)
    if channels is None:
        return None
    layer = layer_wise(channels)
    r = channels.scale / layer.scale
    shift = layer.scale * (layer.zero - channels.zero)
    metadata = ((SCALE, repr(float(layer.scale))), (ZERO_POINT, str(int(layer.zero))))
    return Change(r, r * shift, norm.scale / r, norm.bias / r - shift, metadata)


class LayerWise(MoveIntoReaders):
    """Rule 1."""

    name = "layer_wise"

    def __init__(self, ranges: Ranges, bits: int) -> None:
        self.ranges = ranges
        self.bits = bits

    def wanted(self, norm: Norm) -> Failure | None:
        if ZERO_POINT in norm.node.metadata_props:
            return QUIET
        if norm.output.name not in self.ranges:
            return Failure(f"there are no ranges for {norm.output.name}", (norm.node,))
        return None

    def change(self, norm: Norm, readers: Sequence[LinearReader]) -> Change | Failure:
        ranges = self.ranges[norm.output.name or ""]
        if ranges.low.shape != (norm.channels,):
            return Failure(f"the ranges have {ranges.low.size} channels, the norm {norm.channels}", (norm.node,))
        return reparameterize(norm, ranges, self.bits) or Failure("its ranges are empty or not finite", (norm.node,))


@dataclass(frozen=True)
class LayerWiseScales(RewritePass):
    """Norms changed so that one quantization scale fits all of their channels.

    Attributes:
        ranges: Measured ranges, or the file that holds them.
        bits: Width of the codes.
    """

    name: ClassVar[str] = "layer_wise_scales"
    ranges: str | Ranges = field(default="", hash=False)
    bits: int = 8

    def rules(self) -> Sequence[Rule]:
        return (LayerWise(load_ranges(self.ranges), self.bits),)
