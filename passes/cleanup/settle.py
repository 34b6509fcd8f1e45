"""Repeat passes until none of them changes anything, so that a second run of a preset finds nothing left to do.

What a late pass makes (a constant operand, two Transposes in a row, a value that is read once) can be what an early one
looks for. The passes run in turn, round after round, until each has seen the graph as it is and left it alone. Nearly
always that is one round, in which nothing fires: it costs the search, which is small beside shape inference and
verification. Shapes are derived again only after a change.

No pair of passes undoes one another; should one do so all the same, the rounds are bounded and a remark names the
passes that were still at work.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.shapes import infer_shapes
from xform.rewrite.passes import Pass, PassContext
from xform.rewrite.remarks import RemarkLog


@dataclass(frozen=True)
class Settle(Pass):
    """Passes repeated to a fixpoint.

    Attributes:
        passes: Names, in order; empty for the exact ones that ran before this one and were not rolled back.
        rounds: Largest number of rounds.
    """

    name = "settle"
    passes: tuple[str, ...] = ()
    rounds: int = 8

    def run(self, model: ir.Model, context: PassContext) -> bool:
        from xform.passes import PASSES  # the registry, which holds this pass too

        passes = [PASSES[name]() for name in self.passes] if self.passes else self._repeated(context)
        missed: dict[str, RemarkLog] = {}
        quiet, changed, stale = 0, False, False
        for number in range(self.rounds * len(passes)):
            if quiet == len(passes):
                break
            one = passes[number % len(passes)]
            if number % len(passes) == 0 and stale:
                infer_shapes(model)
                stale = False
            inner = PassContext(context.target, RemarkLog(), context.statistics, context.limit, context.applications)
            if one.run(model, inner):
                changed, stale, quiet = True, True, 0
            else:
                quiet += 1
            context.applications = inner.applications
            context.remarks.remarks.extend(r for r in inner.remarks if r.verdict != "missed")
            missed[one.name] = RemarkLog([r for r in inner.remarks if r.verdict == "missed"])
        context.remarks.remarks.extend(remark for log in missed.values() for remark in log)
        if quiet < len(passes):
            context.remark(self.name, "", "missed", (), f"the graph still changed after {self.rounds} rounds")
        if stale:
            infer_shapes(model)
        return changed

    def _repeated(self, context: PassContext) -> list[Pass]:
        """What ran before, each once; shapes are inferred between the rounds in any case."""
        apart = (self.name, "infer_shapes")
        exact = {one.name: one for one in context.before if one.fidelity == "exact" and one.name not in apart}
        return list(exact.values())
