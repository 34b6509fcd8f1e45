"""Compiling a captured graph for a user: with another backend where the default one cannot, and nothing unsaid."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from xform.backends import FALLBACK, get_backend
from xform.compilation import Compiled, Request, compile_graph
from xform.errors import KernelError
from xform.progress import Bar
from xform.tell import each_once, tell

_LOG = logging.getLogger("xform")


def compile_and_tell(captured: ir.Model, request: Request, notes: list[str], **options: Any) -> Compiled:
    """`compile_graph`, and every warning of its report as an XformWarning and in the log.

    Where the backend has no kernel for an operator in its dtype, and the user did not choose the backend, another one
    is taken, with a warning.

    Args:
        notes: Warnings that come before those of the compilation.
        options: See `compile_graph`.

    Raises:
        TargetError: The backend cannot run the graph; names the operator, the node, and a backend that can.
    """
    with each_once():
        try:
            compiled, fallback = _compiled(captured, request, options)
        finally:
            if isinstance(request.progress, Bar):
                request.progress.close()
        compiled.report.warnings[:0] = [*notes, *fallback]
        for warning in compiled.report.warnings:
            tell(warning)
    report = compiled.report
    _LOG.info(
        "%s: captured and compiled with %s in %.1f s, verified: %s",
        report.source, report.backend, sum(report.seconds.values()), report.verification.passed,
    )  # fmt: skip
    return compiled


def _compiled(captured: ir.Model, request: Request, options: dict[str, Any]) -> tuple[Compiled, list[str]]:
    """What was compiled, and in words why with another backend than the default one, if so."""
    try:
        return compile_graph(captured, request, **options), []
    except KernelError as error:
        other = FALLBACK.get(request.backend.name)
        if (
            other is None
            or request.only_this_backend
            or request.lowering.opset is not None
            or request.lowering.portable
        ):
            raise
        told = f"{error.what}, so backend {other!r} was taken instead of {request.backend.name!r}"
        backend = get_backend(other, request.target, compile_only=request.lowering.compile_only)
        return compile_graph(captured, replace(request, backend=backend, only_this_backend=True), **options), [told]
