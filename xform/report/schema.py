"""The report of one optimization, as data: the versioned schema `xform.report/1`.

The same object is printed to the terminal, rendered as HTML and written as `report.json`; nothing is computed while
rendering. Times are in seconds, latencies in milliseconds, sizes in bytes. A quantity that was not measured is None,
never zero. In JSON a float that is no number is the string "nan", "inf" or "-inf", so that every JSON reader loads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from xform.report.environment import Environment
from xform.rewrite.remarks import Remark

SCHEMA = "xform.report/1"

Status = Literal["changed", "unchanged", "rolled_back"]


@dataclass(frozen=True)
class Size:
    """How large a graph is.

    Attributes:
        nodes: Number of operator nodes, subgraphs included.
        parameters: Number of weight elements.
        bytes: Bytes of weights.
        flops: Floating-point operations of one run, a multiply-add as two; None where shapes are unknown.
    """

    nodes: int
    parameters: int
    bytes: int
    flops: int | None = None


@dataclass(frozen=True)
class PassReport:
    """What one run of one pass did.

    Attributes:
        name: The pass.
        fidelity: "exact", "approximate" or "trained".
        status: Whether the pass changed the graph, left it, or was undone because it broke something.
        applied: Rule applications that stand.
        missed: Places that nearly matched.
        rolled_back: Rule applications that were undone.
        seconds: Time in the pass itself, without its verification.
        verify_seconds: Time spent comparing numbers after it.
        max_abs_error: Largest absolute difference from the captured model after this pass; None if not compared.
        max_rel_error: The same, relative to the largest magnitude of each output.
        before: Size of the graph before the pass.
        after: Size of the graph after it.
        reason: Why it was rolled back.
    """

    name: str
    fidelity: str
    status: Status
    applied: int = 0
    missed: int = 0
    rolled_back: int = 0
    seconds: float = 0.0
    verify_seconds: float = 0.0
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    before: Size | None = None
    after: Size | None = None
    reason: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """The comparison of the result with the captured model.

    Attributes:
        mode: "each", "final" or "off".
        passed: The outcome; None if nothing was compared.
        max_abs_error: Largest absolute difference over all outputs and cases.
        max_rel_error: The same, relative to the values around it (see docs/verification.md).
        tolerance: The relative tolerance that was asked for.
        cases: Number of input sets.
        inputs: Each of them in words: where it is from, sizes of dynamic dims, styles of masks, special values.
        given: Number of input sets of the user.
        derived: Number of input sets made from those: other sizes, other masks.
        random: Number of input sets drawn.
        sizes: Numbers that each dynamic dim had, as "batch: 0, 1, 2".
        masks: Styles of masks.
        branches: Number of branches that depend on data.
        reached: How many of them some input set went through.
        forced: How many of the others were compared with their condition replaced by a constant.
        unreached: Branches in which nothing was compared, in words.
        refused: Input sets that the model itself does not take, in words.
        oracle: What the reference is, in words.
        reason: Why nothing was compared, or what failed.
    """

    mode: str
    passed: bool | None = None
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    tolerance: float | None = None
    cases: int = 0
    inputs: tuple[str, ...] = ()
    given: int = 0
    derived: int = 0
    random: int = 0
    sizes: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    branches: int = 0
    reached: int = 0
    forced: int = 0
    unreached: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    oracle: str = ""
    reason: str = ""


@dataclass(frozen=True)
class LatencyReport:
    """Latency before and after, measured in turn in processes of their own.

    Attributes:
        before_ms: Median milliseconds of the model as it came, over the middle half of the rounds (those in which the
            machine was neither unusually fast nor slow).
        after_ms: The same of the optimized model, over the same rounds.
        speedup: before_ms / after_ms; above 1 is faster.
        rounds: How often each model was measured.
        threads: Intra-op threads of the runtime; None for its default.
    """

    before_ms: float
    after_ms: float
    speedup: float
    rounds: int
    threads: int | None = None


@dataclass
class Report:
    """Everything that is known about one optimization.

    Attributes:
        source: File or class name of the model.
        target: The target as text, "cpu", "edge:aarch64".
        preset: Name of the preset; "custom" when passes were named.
        backend: Name of the backend that the result was lowered for.
        opset_before: Default-domain opset of the model as it came.
        opset_after: The one of the result.
        before: Size of the captured graph.
        after: Size of the result.
        passes: One entry per run of a pass, in order.
        remarks: Every decision of every rule.
        concepts: Semantic operators in the result, by concept ("attention": 12).
        placement: Number of nodes of the lowered model by where they run ("CPUExecutionProvider": 80).
        artifact: What the backend says of the lowered model: operators, forms that were chosen, session settings.
        verification: The final comparison.
        latency: Present where it was measured.
        environment: Versions and machine.
        seconds: Wall time by step ("capture", "passes", "verify", "lower").
        warnings: What the user should know and nothing failed for.
    """

    source: str
    target: str
    preset: str
    backend: str
    opset_before: int | None = None
    opset_after: int | None = None
    before: Size | None = None
    after: Size | None = None
    passes: list[PassReport] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    concepts: dict[str, int] = field(default_factory=dict)
    placement: dict[str, int] = field(default_factory=dict)
    artifact: dict[str, Any] = field(default_factory=dict)
    verification: VerificationReport = field(default_factory=lambda: VerificationReport("off"))
    latency: LatencyReport | None = None
    environment: Environment = field(default_factory=Environment.here)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    schema: str = SCHEMA

    def about(self, concept: str) -> list[Remark]:
        """Remarks whose concept, pass or rule is `concept`, or which name a node that was one."""
        return [r for r in self.remarks if r.is_about(concept)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, the schema's name first."""
        data = asdict(self)
        data["remarks"] = [remark.as_dict() for remark in self.remarks]
        return {"schema": self.schema, **{k: plain(v) for k, v in data.items() if k != "schema"}}

    def to_json(self) -> str:
        """One JSON document, indented."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        from xform.report.brief import verdict

        return f"<xform.Report {self.source}: {self.backend} on {self.target}, {verdict(self)}>"

    def __str__(self) -> str:
        """What a person wants to know first, in at most ten lines."""
        from xform.report.brief import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from xform.report.brief import as_html

        return as_html(self)


def plain(value: Any) -> Any:
    """`value` with only what strict JSON knows: numbers that are none become text, tuples lists, other objects text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    if hasattr(value, "item"):  # a NumPy scalar
        return plain(value.item())
    return str(value)
