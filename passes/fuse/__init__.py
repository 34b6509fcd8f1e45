"""Operators put into the shapes and places in which runtimes run them fast."""

from __future__ import annotations

from xform.passes.fuse.absorb_channel_shuffle import AbsorbChannelShuffle
from xform.passes.fuse.absorb_transposes import AbsorbTransposes
from xform.passes.fuse.pack_products import PackProducts
from xform.passes.fuse.patches_to_products import PatchesToProducts
from xform.passes.fuse.split_channel_multiplier import SplitChannelMultiplier

__all__ = ["AbsorbChannelShuffle", "AbsorbTransposes", "PackProducts", "PatchesToProducts", "SplitChannelMultiplier"]
