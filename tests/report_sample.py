"""A report with every part filled."""

from __future__ import annotations

import math

from xform.report.schema import LatencyReport, PassReport, Report, Size, VerificationReport
from xform.rewrite.remarks import Cost, Remark


def make_report() -> Report:
    """A report with every part filled."""
    return Report(
        "model.onnx",
        "cpu",
        "exact",
        "onnxruntime",
        opset_before=17,
        opset_after=20,
        before=Size(10, 100, 400, 1000),
        after=Size(6, 90, 360, 900),
        passes=[
            PassReport("fold", "exact", "changed", 3, 1, 0, 0.5, 0.1, 1e-7, 2e-7, Size(10, 100, 400), Size(6, 90, 360)),
            PassReport("idle", "exact", "unchanged", before=Size(6, 90, 360), after=Size(6, 90, 360)),
            PassReport("bad", "exact", "rolled_back", rolled_back=2, max_rel_error=math.inf, reason="output y differs"),
        ],
        remarks=[
            Remark("fold", "conv", "applied", ("c1",), "", "batch_norm", Cost(2), Cost(1)),
            Remark("fold", "conv", "missed", ("c2", "b2"), "padded with <zeros>", "batch_norm"),
            Remark("fold", "conv", "missed", ("c3",), "padded with <zeros>", "batch_norm"),
            Remark("bad", "", "rolled_back", ("n",), "output y differs"),
        ],
        concepts={"attention": 2},
        placement={"CPUExecutionProvider": 6},
        artifact={"opset": 20, "lowered": {"linear: Gemm": 2}},
        verification=VerificationReport("final", True, 1e-6, 2e-6, 1e-4, 2, random=2),
        latency=LatencyReport(10.0, 5.0, 2.0, 7),
        seconds={"capture": 0.25},
        warnings=["weights hold NaN"],
    )
