"""Running a library's own pass inside the Pass contract.

The libraries' passes do not know of two things that must survive: default values of inputs (initializers that the
caller can override are no constants), and the declared names and shapes of the interface. `guarded` protects them; what
a library pass breaks nevertheless is an error, which the pipeline answers with a rollback.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir

from xform.errors import XformError
from xform.graph.values import display_name
from xform.rewrite.passes import Pass, PassContext

NAMES_LIMIT = 24  # node names listed in a remark


@dataclass(frozen=True)
class LibraryPass(Pass):
    """A pass that a library implements; it counts as one application."""

    @abstractmethod
    def apply(self, model: ir.Model) -> bool:
        """Run the library's pass on `model`; return whether it changed."""

    def run(self, model: ir.Model, context: PassContext) -> bool:
        """Apply the pass under guard and remark what disappeared.

        Raises:
            XformError: The library's pass failed or changed the model's interface.
        """
        if context.exhausted:
            return False
        before = {node: display_name(node) for node in ir.traversal.RecursiveGraphIterator(model.graph)}
        initializers = sum(len(g.initializers) for g in model.graphs())
        with guarded(model, self.name), _quiet():
            try:
                changed = self.apply(model)
            except XformError:
                raise
            except Exception as error:
                raise XformError(
                    f"pass {self.name} failed inside a library: {type(error).__name__}: {error}",
                    hint="leave the pass out of the pipeline, and report the model",
                ) from error
        if changed:
            after = set(ir.traversal.RecursiveGraphIterator(model.graph))
            gone = [name for node, name in before.items() if node not in after]
            dropped = initializers - sum(len(g.initializers) for g in model.graphs())
            context.applications += 1
            context.remark(
                self.name, self.name, "applied", gone[:NAMES_LIMIT], _summary(len(gone), dropped), concept="cleanup"
            )
        return changed


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' log warnings about what they skipped off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _summary(nodes: int, initializers: int) -> str:
    parts = [f"{nodes} nodes removed"] if nodes else []
    if initializers:
        parts.append(f"{abs(initializers)} constants {'removed' if initializers > 0 else 'added'}")
    return ", ".join(parts)


@contextmanager
def guarded(model: ir.Model, pass_name: str) -> Iterator[None]:
    """Keep the interface of `model` as it is, and hide default values of inputs, while a library's pass runs.

    Raises:
        XformError: An input or output was lost, added or renamed.
    """
    graph = model.graph
    inputs, outputs = _interface(graph.inputs), _interface(graph.outputs)
    defaults = {v: v.const_value for v in graph.inputs if v.is_initializer()}
    for value in defaults:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in defaults.items():
            value.const_value = tensor
            if not value.is_initializer():
                graph.register_initializer(value)
    for kind, old, new in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
        before, after = [name for name, _, _ in old], [v.name for v in new]
        if before != after:
            raise XformError(f"pass {pass_name} changed the model's {kind} from {before} to {after}")
        for value, (_, kept_type, shape) in zip(new, old, strict=True):
            value.type = kept_type if kept_type is not None else value.type
            value.shape = shape if shape is not None else value.shape


def _interface(
    values: Iterable[ir.Value],
) -> list[tuple[str | None, ir.TypeProtocol | None, ir.Shape | None]]:
    return [(v.name, v.type, v.shape.copy() if v.shape is not None else None) for v in values]
