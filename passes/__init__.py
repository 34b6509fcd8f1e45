"""Every pass by name. A new pass is one import and one line here."""

from __future__ import annotations

from xform.passes.attention import PackTokens
from xform.passes.canonicalize.raise_activation import RaiseActivation
from xform.passes.canonicalize.raise_attention import RaiseAttention
from xform.passes.canonicalize.raise_gelu import RaiseGelu
from xform.passes.canonicalize.raise_layer_norm import RaiseLayerNorm
from xform.passes.canonicalize.raise_linear import RaiseLinear
from xform.passes.canonicalize.raise_rms_norm import RaiseRMSNorm
from xform.passes.canonicalize.raise_rotary import RaiseRotary
from xform.passes.canonicalize.raise_softmax import RaiseSoftmax
from xform.passes.cleanup import (
    DeduplicateInitializers,
    EliminateCommonSubexpressions,
    EliminateIdentities,
    EliminateNoOps,
    EliminateUnreadRows,
    FoldConstants,
    FoldShapeArithmetic,
    InferShapes,
    PropagateConstants,
    RemoveDeadCode,
    Settle,
    SimplifyLayout,
)
from xform.passes.fuse import (
    AbsorbChannelShuffle,
    AbsorbTransposes,
    PackProducts,
    PatchesToProducts,
    SplitChannelMultiplier,
)
from xform.passes.integer import ApproximateGelu, QuantizeProducts, QuantizeStatic, ScaleChannels, ShiftChannels
from xform.passes.normalize import (
    AbsorbNormAffine,
    CompressRMSNorm,
    LayerNormToRMSNorm,
    LayerWiseScales,
    MigrateScales,
    WidenNormStatistics,
)
from xform.passes.precision import ConvertPrecision
from xform.passes.reparameterize import FoldBatchNorm, MergeAffineMaps, RaiseBlockLinear
from xform.rewrite.passes import Pass

PASSES: dict[str, type[Pass]] = {
    pass_class.name: pass_class
    for pass_class in (
        # canonicalize
        RaiseLinear,
        RaiseLayerNorm,
        RaiseRMSNorm,
        RaiseGelu,
        RaiseActivation,
        RaiseSoftmax,
        RaiseRotary,
        RaiseAttention,
        # reparameterize
        RaiseBlockLinear,
        FoldBatchNorm,
        MergeAffineMaps,
        # normalize
        LayerNormToRMSNorm,
        AbsorbNormAffine,
        CompressRMSNorm,
        LayerWiseScales,
        MigrateScales,
        WidenNormStatistics,
        # attention
        PackTokens,
        # fuse
        SplitChannelMultiplier,
        AbsorbChannelShuffle,
        AbsorbTransposes,
        PackProducts,
        PatchesToProducts,
        # integer
        ApproximateGelu,
        QuantizeProducts,
        QuantizeStatic,
        ScaleChannels,
        ShiftChannels,
        # precision
        ConvertPrecision,
        # cleanup
        EliminateIdentities,
        FoldConstants,
        FoldShapeArithmetic,
        PropagateConstants,
        EliminateNoOps,
        EliminateUnreadRows,
        SimplifyLayout,
        EliminateCommonSubexpressions,
        DeduplicateInitializers,
        RemoveDeadCode,
        InferShapes,
        Settle,
    )
}
