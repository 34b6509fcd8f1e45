"""Remarks: what a pass did, nearly did, or had undone, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["applied", "missed", "rolled_back"]


@dataclass(frozen=True)
class Cost:
    """Size of a graph or of a matched region.

    Attributes:
        nodes: Number of operator nodes.
        parameters: Number of weight elements.
        flops: Floating-point operations of one run, a multiply-add as two; None where shapes are unknown.
    """

    nodes: int
    parameters: int = 0
    flops: int | None = None


@dataclass(frozen=True)
class Remark:
    """One decision of one rule.

    Attributes:
        pass_name: The pass.
        rule: The rule inside the pass.
        verdict: "applied", "missed" (nearly: the reason says what was lacking) or "rolled_back".
        nodes: Original names of the nodes concerned.
        reason: For missed and rolled_back: the failed condition. For applied: what was done, may be empty.
        concept: What users ask about ("attention", "layer_norm", "batch_norm", ...), for `explain`.
        touches: Concepts that its nodes were in the captured model: a merged convolution touches "batch_norm" too.
    """

    pass_name: str
    rule: str
    verdict: Verdict
    nodes: tuple[str, ...] = ()
    reason: str = ""
    concept: str = ""
    cost_before: Cost | None = None
    cost_after: Cost | None = None
    touches: tuple[str, ...] = ()

    def is_about(self, name: str) -> bool:
        """Whether its concept, pass or rule is `name`, or one of its nodes was a `name`."""
        return name in (self.concept, self.pass_name, self.rule, *self.touches)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data = asdict(self)
        data["nodes"], data["touches"] = list(self.nodes), list(self.touches)
        return data


@dataclass
class RemarkLog:
    """An append-only list of remarks with queries."""

    remarks: list[Remark] = field(default_factory=list)

    def add(self, remark: Remark) -> None:
        self.remarks.append(remark)

    def __iter__(self) -> Iterator[Remark]:
        return iter(self.remarks)

    def __len__(self) -> int:
        return len(self.remarks)

    def count(self, verdict: Verdict, concept: str | None = None) -> int:
        """How many remarks have this verdict (and this concept)."""
        return sum(r.verdict == verdict and (concept is None or r.concept == concept) for r in self.remarks)

    def about(self, concept: str) -> list[Remark]:
        """Remarks about `concept`, and those of rules whose name contains it."""
        return [r for r in self.remarks if r.is_about(concept) or concept in r.rule]
