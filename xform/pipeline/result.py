"""What a run of the pipeline gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from xform.graph.count import count
from xform.pipeline.verify import Verification, Verifier
from xform.report.schema import PassReport, Size
from xform.rewrite.remarks import RemarkLog
from xform.rewrite.rule import RuleStatistics


@dataclass
class PipelineResult:
    """The rewritten model and everything that was decided on the way.

    Attributes:
        model: The rewritten model; the captured one is untouched.
        remarks: What every pass did, nearly did, or had undone.
        passes: One report per pass, in order.
        verification: The verdict on `model`.
        statistics: Tries, hits and seconds per (pass, rule), of passes that were rolled back too.
        seconds: Wall time by step: "passes", "verify".
        verifier: Holds the input sets and the reference numbers, to compare further forms of the model with; None where
            verification was off.
    """

    model: ir.Model
    remarks: RemarkLog = field(default_factory=RemarkLog)
    passes: list[PassReport] = field(default_factory=list)
    verification: Verification = field(default_factory=lambda: Verification("off"))
    statistics: dict[tuple[str, str], RuleStatistics] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    verifier: Verifier | None = None

    @property
    def rolled_back(self) -> list[PassReport]:
        """Passes that were undone, with the reason."""
        return [report for report in self.passes if report.status == "rolled_back"]


_COUNT_FLOPS_UP_TO = (
    4000  # nodes; counting takes about 20 us a node, and is done after every pass that changed something
)


def size_of(model: ir.Model) -> Size:
    """Nodes, weight elements and weight bytes of a model, subgraphs included; no weight is loaded.

    FLOPs count symbolic dims as 1, and are left out where some node's are unknown or the graph is large.
    """
    nodes = sum(1 for _ in model.graph.all_nodes())
    parameters = size = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                parameters += tensor.size
                size += tensor.nbytes
    if nodes > _COUNT_FLOPS_UP_TO:
        return Size(nodes, parameters, size)
    counts = count(model)
    return Size(nodes, parameters, size, None if counts.unknown else counts.flops)
