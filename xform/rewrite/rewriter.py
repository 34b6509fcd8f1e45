"""The only way to change a graph: apply rules to a fixpoint, with provenance, statistics and an undo log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from xform.errors import XformError
from xform.graph.values import display_name
from xform.rewrite.agreement import disagreement, lost_kernel, uncertain_rank
from xform.rewrite.builder import Builder, UnknownRankError
from xform.rewrite.edits import Edit, commit, undo
from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule, RuleStatistics

if TYPE_CHECKING:
    from xform.rewrite.passes import PassContext

FEW_READERS = 8
MAX_ORIGINS = 24  # names kept in a node's provenance; longer lists end in "+N more"


def _values(result: ir.Value | Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    return (result,) if isinstance(result, ir.Value) else tuple(result)


@dataclass
class _Missed:
    """The last near miss per (rule, node), told at the end unless the rule fired there after all."""

    failures: dict[tuple[str, ir.Node], Failure] = field(default_factory=dict)

    def set(self, rule: Rule, node: ir.Node, failure: Failure) -> None:
        self.failures[rule.name, node] = failure

    def clear(self, rule: Rule, node: ir.Node) -> None:
        self.failures.pop((rule.name, node), None)


class Rewriter:
    """Applies rules to every graph of a model, subgraphs of If, Loop and Scan included.

    Args:
        model: Changed in place.
        pass_name: Recorded on new nodes and remarks.
        context: Receives remarks and statistics; its `limit` bounds the number of applications.
    """

    def __init__(self, model: ir.Model, pass_name: str, context: PassContext) -> None:
        self.model = model
        self.pass_name = pass_name
        self.context = context
        self.edits: list[Edit] = []
        self._search = Search(model.opset_imports)
        self._names = _names(model)
        self._counter: dict[str, int] = {}
        self._missed = _Missed()
        self._concepts: dict[str, str] = {}
        self._unsorted: set[ir.Graph] = set()

    def apply(self, rules: Sequence[Rule]) -> bool:
        """Apply `rules` until none fires anywhere; return whether the model changed.

        At a node, earlier rules are tried first. A replaced node's readers are tried again as far up as the deepest
        rule can see.

        Raises:
            XformError: The rules keep undoing one another (an internal error).
        """
        table = _Table(rules)
        self._concepts.update((rule.name, rule.concept) for rule in rules)
        queue: deque[ir.Node] = deque(self.model.graph.all_nodes())
        queued = set(queue)
        bound = 20 * len(queue) + 1000
        fired = 0
        while queue and not self.context.exhausted:
            node = queue.popleft()
            queued.discard(node)
            edit = self._visit(table.at(node), node) if node.graph is not None else None
            if edit is None:
                continue
            fired += 1
            if fired > bound:
                raise XformError(
                    f"pass {self.pass_name} does not come to an end: rule {edit.rule} fired {fired} times",
                    where=edit.origin,
                )
            for touched in _touched(edit, node, table.reach, table.ahead):
                if touched not in queued and touched.graph is not None:
                    queued.add(touched)
                    queue.append(touched)
        self._sort()
        self._tell_missed()
        return fired > 0

    def undo(self, count: int | None = None) -> None:
        """Take back the last `count` applications (default: all)."""
        for _ in range(len(self.edits) if count is None else count):
            undo(self.edits.pop())
        self._unsorted.add(self.model.graph)
        self._sort()

    def _visit(self, rules: Iterable[Rule], node: ir.Node) -> Edit | None:
        for rule in rules:
            statistics = self.context.statistics.setdefault((self.pass_name, rule.name), RuleStatistics())
            statistics.tries += 1
            start = time.perf_counter()
            edit = self._try(rule, node)
            statistics.seconds += time.perf_counter() - start
            if edit is not None:
                statistics.hits += 1
                return edit
        return None

    def _try(self, rule: Rule, node: ir.Node) -> Edit | None:
        failure: Failure | None = None
        for found in rule.matches(node, self._search):
            result = found if isinstance(found, Failure) else self._attempt(rule, found)
            if isinstance(result, Edit):
                self._missed.clear(rule, node)
                return result
            failure = failure or result
        if failure is not None and failure.reason:
            self._missed.set(rule, node, failure)
        return None

    def _attempt(self, rule: Rule, match: Match) -> Edit | Failure:
        failure = rule.check(match, self.context) or rule.profit(match, self.context)
        if failure is not None:
            return failure
        nodes = match.all_nodes()
        origin = _origin(nodes)
        names = tuple(dict.fromkeys(display_name(n) for n in nodes))  # before the commit, which renames values
        builder = Builder(self.model.opset_imports, self._unique, origin, self.pass_name, rule.name)
        try:
            result = rule.rewrite(match, builder)
        except UnknownRankError as error:
            result = Failure(str(error), tuple(nodes))
        values = () if isinstance(result, Failure) else _values(result)
        refused = result if isinstance(result, Failure) else self._refused(rule, match, values, builder)
        if refused is not None:
            builder.discard()
            return refused
        edit = commit(rule.name, origin, match.roots, values, builder, self._unique)
        self.edits.append(edit)
        self.context.applications += 1
        if len(match.roots) > 1 and edit.graph is not None:
            self._unsorted.add(edit.graph)
        self.context.remark(
            self.pass_name, rule.name, "applied", names, match.note, rule.concept, match.cost_before, match.cost_after
        )
        return edit

    def _refused(self, rule: Rule, match: Match, values: Sequence[ir.Value], builder: Builder) -> Failure | None:
        """Why the replacement is not what it replaces, whatever the rule says; see `xform.rewrite.agreement`."""
        nodes = match.all_nodes()
        if len(values) != len(match.roots):
            raise XformError(
                f"rule {rule.name} gave {len(values)} values for {len(match.roots)} roots", where=_origin(nodes)
            )
        reason = next(iter(builder.lossy), None) or lost_kernel(nodes, builder.nodes, self.context.target)
        reason = reason or uncertain_rank(nodes)
        for old, new in zip(match.roots, values, strict=True):
            reason = reason or disagreement(old, new)
        return None if reason is None else Failure(reason, tuple(nodes))

    def _tell_missed(self) -> None:
        told: set[tuple[str, tuple[str, ...], str]] = set()
        for (rule_name, node), failure in self._missed.failures.items():
            if node.graph is None:
                continue
            names = tuple(dict.fromkeys(display_name(n) for n in (failure.nodes or (node,))))
            if (rule_name, names, failure.reason) in told:
                continue
            told.add((rule_name, names, failure.reason))
            self.context.remark(
                self.pass_name, rule_name, "missed", names, failure.reason, self._concepts.get(rule_name, "")
            )

    def _sort(self) -> None:
        for graph in self._unsorted:
            graph.sort()
        self._unsorted.clear()

    def _unique(self, base: str) -> str:
        name = base
        while name in self._names:
            self._counter[base] = self._counter.get(base, 0) + 1
            name = f"{base}_{self._counter[base]}"
        self._names.add(name)
        return name


class _Table:
    """Rules by anchor, in order."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(rule, rule.anchors()) for rule in rules]
        self._cache: dict[Key, list[Rule]] = {}
        self.reach = max((rule.reach() for rule in rules), default=0)
        self.ahead = max((rule.ahead() for rule in rules), default=0)

    def at(self, node: ir.Node) -> list[Rule]:
        key = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        if key not in self._cache:
            self._cache[key] = [rule for rule, anchors in self._rules if anchors is None or key in anchors]
        return self._cache[key]


def _touched(edit: Edit, node: ir.Node, reach: int, ahead: int) -> list[ir.Node]:
    """Nodes whose match may have changed: new ones, readers up to `reach` levels, and up to `ahead` levels of what
    produced the operands of nodes that went away."""
    seen: dict[ir.Node, None] = {node: None}
    frontier: list[ir.Value] = [*(o for n in edit.added for o in n.outputs), *(r.new for r in edit.replacements)]
    seen.update(dict.fromkeys(edit.added))
    for _ in range(reach):
        readers = {n: None for v in frontier for n, _ in v.uses() if n not in seen}
        seen.update(readers)
        frontier = [o for n in readers for o in n.outputs]
        if not frontier:
            break
    for removal in edit.removals:
        for value in removal.inputs:
            producer = value.producer() if value is not None else None
            if value is not None and producer is not None:  # a constant has no rule to enable, and many readers
                seen[producer] = None
                seen.update(dict.fromkeys(_producers(producer, ahead - 1)))
                if len(value.uses()) <= FEW_READERS:  # rules that want a value read once
                    seen.update((n, None) for n, _ in value.uses())
    return list(seen)


def _producers(node: ir.Node, levels: int) -> list[ir.Node]:
    """What computes the operands of `node`, up to `levels` operators deep."""
    found: dict[ir.Node, None] = {}
    frontier = [node]
    for _ in range(levels):
        makers = (value.producer() for n in frontier for value in n.inputs if value is not None)
        frontier = list(dict.fromkeys(maker for maker in makers if maker is not None and maker not in found))
        found.update(dict.fromkeys(frontier))
    return list(found)


def _origin(nodes: Sequence[ir.Node]) -> str:
    names = list(dict.fromkeys(part for n in nodes for part in display_name(n).split(", ")))
    if len(names) > MAX_ORIGINS:
        names = [*names[:MAX_ORIGINS], f"+{len(names) - MAX_ORIGINS} more"]
    return ", ".join(names)


def _names(model: ir.Model) -> set[str]:
    names: set[str] = set()
    for graph in model.graphs():
        names.update(v.name for v in graph.inputs if v.name)
        names.update(graph.initializers)
        for node in graph:
            if node.name:
                names.add(node.name)
            names.update(v.name for v in node.outputs if v.name)
    return names
