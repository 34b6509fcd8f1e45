"""What a user demands of a result: `--require` (exit code 4) and budgets (exit code 6)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xform.cli.common import closest, human_bytes
from xform.errors import BudgetError, RequirementError, UsageError
from xform.report.schema import LatencyReport
from xform.report.terminal import findings, place_list
from xform.rewrite.remarks import Remark
from xform.text import shown

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_REASONS_SHOWN = 6


@dataclass(frozen=True)
class Requirement:
    """`attention>=12`: how often a concept or operator must occur in the result."""

    name: str
    comparison: str
    count: int

    def met(self, counts: Mapping[str, int]) -> bool:
        """Whether `counts` (by concept and operator) fulfil it; what does not occur counts zero."""
        return _COMPARISONS[self.comparison](counts.get(self.name, 0), self.count)

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.count}"


def parse_requirement(text: str) -> Requirement:
    """Read `NAME` or `NAME>=N` (also `<= == != > <`).

    NAME is a concept or an operator: `Conv`, `ai.onnx.Conv`, `com.microsoft.Gelu`.

    Raises:
        UsageError: Not of this form, or a name that is neither a concept nor an operator: it could never be met, or
            would always be.
    """
    from xform.report.concepts import COUNTED

    match = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*(?:(>=|<=|==|!=|=|>|<)\s*(\d{1,18}))?\s*", text)
    if match is None:
        raise UsageError(f"--require {shown(text)!r} is no requirement", hint="write for example attention>=12")
    name = match[1]
    bare = name.removeprefix("ai.onnx.")
    if bare != name and "." not in bare and _is_operator(bare):
        name = bare  # operators of this domain are counted by their bare names
    elif name not in COUNTED and not _is_operator(name):
        raise UsageError(
            f"--require {shown(text)!r}: {name!r} is neither a concept nor an operator", hint=closest(name, COUNTED)
        )
    return Requirement(name, match[2] or ">=", int(match[3]) if match[3] else 1)


def _is_operator(name: str) -> bool:
    import onnx.defs

    domain, _, op_type = name.rpartition(".")
    if (
        domain and domain != "ai.onnx"
    ):  # ONNX does not know the operators of other domains; they start with a capital everywhere
        return op_type[:1].isupper()
    return any(schema.name == op_type for schema in onnx.defs.get_all_schemas() if not schema.domain)


def check_requirements(
    requirements: Sequence[Requirement], counts: Mapping[str, int], remarks: Sequence[Remark]
) -> list[dict[str, Any]]:
    """Check all requirements; the JSON form of each with what was found.

    Raises:
        RequirementError: Naming every unmet one, what was found, and why more was not.
    """
    unmet = [r for r in requirements if not r.met(counts)]
    if not unmet:
        return requirements_found(requirements, counts)
    what = "; ".join(f"required {r}, found {counts.get(r.name, 0)}" for r in unmet)
    about = [r for r in remarks if r.verdict != "applied" and any(_concerns(r, u.name) for u in unmet)]
    reasons = [
        f"\n    {f.count} x {f.rule}: {f.reason} (at {place_list(f.places, brief=True)})"
        for f in findings(about)[:_REASONS_SHOWN]
    ]
    hint = (
        "what was nearly matched:" + "".join(reasons)
        if reasons
        else "no remark says why; `xform inspect` shows the graph"
    )
    raise RequirementError(what, hint=hint)


def requirements_found(requirements: Sequence[Requirement], counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """JSON form of requirements with what was found."""
    return [{"require": str(r), "found": counts.get(r.name, 0), "met": r.met(counts)} for r in requirements]


def _concerns(remark: Remark, name: str) -> bool:
    return name in (remark.concept, remark.pass_name, remark.rule)


@dataclass(frozen=True)
class Budgets:
    """Limits on the result; None for no limit.

    Attributes:
        max_latency_ratio: Latency after divided by latency before.
        max_size: Bytes of all files written.
        max_error: Largest relative error of the final verification.
    """

    max_latency_ratio: float | None = None
    max_size: int | None = None
    max_error: float | None = None

    def check(self, *, size: int | None, latency: LatencyReport | None, error: float | None) -> None:
        """Compare with what was measured.

        Raises:
            BudgetError: Naming every budget that was missed; a budget that could not be measured is missed.
        """
        missed = []
        if self.max_size is not None and (size is None or size > self.max_size):
            found = "unknown" if size is None else human_bytes(size)
            missed.append(f"size {found} is above the budget of {human_bytes(self.max_size)}")
        if self.max_latency_ratio is not None:
            ratio = None if latency is None else 1 / latency.speedup
            if ratio is None or not ratio <= self.max_latency_ratio:
                found = "unknown" if ratio is None else f"{ratio:.3f}"
                missed.append(f"latency after/before {found} is above the budget of {self.max_latency_ratio:g}")
        if self.max_error is not None and (error is None or not error <= self.max_error):
            found = "unknown (nothing was compared)" if error is None else f"{error:.2e}"
            missed.append(f"relative error {found} is above the budget of {self.max_error:g}")
        if missed:
            raise BudgetError("; ".join(missed), hint="`xform explain` tells what kept passes from doing more")
