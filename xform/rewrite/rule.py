"""The Rule contract: what to look for, whether it is legal, whether it pays, and what to put in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key, Outputs, Pattern

if TYPE_CHECKING:
    from xform.rewrite.builder import Builder
    from xform.rewrite.passes import PassContext


@dataclass(frozen=True)
class Failure:
    """Why a rule did not fire although most of it matched, and the nodes to blame."""

    reason: str
    nodes: tuple[ir.Node, ...] = ()


QUIET = Failure("")  # a failed condition that means "something else", about which there is nothing to tell


@dataclass
class RuleStatistics:
    """Counters of one rule in one run.

    Attributes:
        tries: Nodes at which the rule was tried.
        hits: Times it fired.
        seconds: Wall time spent in it.
    """

    tries: int = 0
    hits: int = 0
    seconds: float = 0.0


class Rule(ABC):
    """One rewrite. Data flows from `check` to `rewrite` through `match.data`, never through `self`.

    Attributes:
        name: Unique within its pass.
        concept: What users ask about, for `explain`.
        pattern: What to look for. A rule that walks the graph itself overrides `anchors`, `reach` and `matches`.
        near_miss: Report a failed search that had bound at least this many nodes as missed; None for never.
    """

    name: ClassVar[str]
    concept: ClassVar[str] = ""
    pattern: ClassVar[Pattern | Outputs | None] = None
    near_miss: ClassVar[int | None] = None

    def anchors(self) -> frozenset[Key] | None:
        """(domain, op type) of the nodes to try; None for all."""
        return None if self.pattern is None else self.pattern.roots()

    def reach(self) -> int:
        """How many operator levels below the anchor a change can make the rule match."""
        return 8 if self.pattern is None else self.pattern.depth()

    def ahead(self) -> int:
        """How many operator levels above the anchor, among its readers and theirs, a change can make the rule match."""
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        """Candidates at `node`, lazily; a Failure among them is a near miss worth telling."""
        if self.pattern is None:
            raise TypeError(f"rule {self.name} has neither a pattern nor its own matches()")
        found = False
        for match in search.at(self.pattern, node):
            found = True
            yield match
        miss = search.near_miss
        if not found and self.near_miss is not None and miss is not None and len(miss.bound) >= self.near_miss:
            yield Failure(f"wanted {miss.wanted}", (miss.at,) if miss.at is not None else miss.bound[-1:])

    def check(self, match: Match, context: PassContext) -> Failure | None:
        """Is it legal here? None if so."""
        return None

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """Is it worth it? None if so. The cost formula belongs in the docstring of the override."""
        return None

    @abstractmethod
    def rewrite(self, match: Match, build: Builder) -> ir.Value | Sequence[ir.Value] | Failure:
        """Build what replaces `match.roots`, value for value."""
