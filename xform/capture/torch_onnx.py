"""An exported program as an ONNX graph, by torch's own exporter.

Operators that the exporter has no translation for are handled in this order: decomposed by torch where torch knows a
decomposition, and otherwise kept, as nodes of the domain `torch` that carry the operator's name and arguments.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _core, _registration

from xform.capture.torch_errors import failing_node
from xform.capture.torch_operators import keep_operator

OPSET = 23


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress and warnings out of the user's terminal; errors are raised anyway."""
    loggers = [logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def translate(program: ExportedProgram) -> ir.Model:
    """The program as an ONNX model at opset 23 that shares its tensors.

    Raises:
        Exception: What the exporter raised on an operator that can neither be decomposed nor kept.
    """
    decomposed: set[torch._ops.OpOverload] = set()
    kept: set[torch._ops.OpOverload] = set()
    while True:
        try:
            return _export(program)
        except Exception as error:
            target = _refused_operator(error)
            if target is None or target in kept:
                raise
            if target not in decomposed and (table := _decomposition(target)):
                decomposed.add(target)
                program = program.run_decompositions(table)
                continue
            kept.add(target)
            if not keep_operator(program, target):
                # The refused operator comes out of a decomposition: show it by decomposing everything.
                program = program.run_decompositions()
                if not keep_operator(program, target):
                    raise


@functools.cache
def _registry() -> _registration.ONNXRegistry:
    """The exporter's translations. torch.onnx.export makes them anew at every call, which takes seconds."""
    return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


def _export(program: ExportedProgram) -> ir.Model:
    with quiet():
        exported = _core.export(program, registry=_registry(), opset_version=OPSET, optimize=False, verbose=False)
    return exported.model


def _refused_operator(error: BaseException) -> torch._ops.OpOverload | None:
    node = failing_node(error)
    return node.target if node is not None and isinstance(node.target, torch._ops.OpOverload) else None


def _decomposition(target: torch._ops.OpOverload) -> dict[Any, Callable[..., Any]]:
    """torch's decomposition of one operator into others, as a table; empty if it knows none."""
    for table in (torch.export.default_decompositions(), torch._decomp.decomposition_table):
        if target in table:
            return {target: table[target]}
    return {}
