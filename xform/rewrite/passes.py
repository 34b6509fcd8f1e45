"""The Pass contract.

A pass is a frozen dataclass whose fields are its options. It changes a model in place, tells the context what it did
and nearly did, and returns whether anything changed. `RewritePass` is the usual kind: a list of rules, applied to a
fixpoint by the rewriter. A pass around a library's own pass implements `run` directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from xform.rewrite.remarks import Cost, Remark, RemarkLog, Verdict
from xform.rewrite.rewriter import Rewriter
from xform.rewrite.rule import Rule, RuleStatistics
from xform.target import Target

Fidelity = Literal["exact", "approximate", "trained"]


@dataclass
class PassContext:
    """What a pass may know and must report to.

    Attributes:
        target: What the result will run on.
        remarks: Where decisions go.
        statistics: Tries, hits and seconds per (pass, rule).
        limit: Stop after this many rule applications in this run (for bisecting); None for no limit.
        applications: Rule applications so far in this run.
        before: Passes that ran before this one and were not rolled back, in order.
    """

    target: Target = field(default_factory=Target)
    remarks: RemarkLog = field(default_factory=RemarkLog)
    statistics: dict[tuple[str, str], RuleStatistics] = field(default_factory=dict)
    limit: int | None = None
    applications: int = 0
    before: tuple[Pass, ...] = ()

    def remark(
        self,
        pass_name: str,
        rule: str,
        verdict: Verdict,
        nodes: Sequence[str] = (),
        reason: str = "",
        concept: str = "",
        cost_before: Cost | None = None,
        cost_after: Cost | None = None,
    ) -> None:
        """Record one decision."""
        self.remarks.add(
            Remark(pass_name, rule, verdict, tuple(nodes), reason, concept, cost_before, cost_after),
        )

    @property
    def exhausted(self) -> bool:
        """Whether the bisection limit is reached, so that no rule may fire any more."""
        return self.limit is not None and self.applications >= self.limit


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a whole model, with its options as dataclass fields."""

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity] = "exact"

    @abstractmethod
    def run(self, model: ir.Model, context: PassContext) -> bool:
        """Rewrite `model` in place; return whether it changed."""

    def options(self) -> dict[str, Any]:
        """The pass's options and their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass made of rules, applied in order at every node until nothing fires."""

    @abstractmethod
    def rules(self) -> Sequence[Rule]:
        """The rules, most specific first."""

    def run(self, model: ir.Model, context: PassContext) -> bool:
        rewriter = Rewriter(model, pass_name=self.name, context=context)
        return rewriter.apply(self.rules())
