"""Compiling a captured graph for a user: with another backend where the default one cannot, and nothing unsaid."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from xform.backends import get_backend
from xform.compilation import Compiled, Request, compile_graph
from xform.errors import TargetError
from xform.progress import Bar
from xform.tell import tell

_LOG = logging.getLogger("xform")
_NO_KERNEL = re.compile(r"Could not find an implementation for (?P<op>\w+)\(\d+\) node with name '(?P<node>[^']*)'")
_FALLBACK = "torch_triton"


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
    except TargetError as error:
        kernel = _NO_KERNEL.search(error.what)
        if kernel is None:
            raise
        what = f"ONNX Runtime has no kernel for {kernel['op']} in {_dtypes(captured)}"
        if request.only_this_backend or not _may_change(request):
            hint = f'leave backend out or use backend="{_FALLBACK}", or convert the model to float32'
            raise TargetError(what, where=kernel["node"] or (), hint=hint) from error
        told = f"{what}, so backend {_FALLBACK!r} was taken instead of {request.backend.name!r}"
        return compile_graph(captured, _elsewhere(request), **options), [told]


def _may_change(request: Request) -> bool:
    return request.lowering.opset is None and not request.lowering.portable and request.backend.name == "onnxruntime"


def _elsewhere(request: Request) -> Request:
    backend = get_backend(_FALLBACK, request.target, compile_only=request.lowering.compile_only)
    return replace(request, backend=backend, only_this_backend=True)


def _dtypes(model: ir.Model) -> str:
    """The float dtypes of a model's inputs, outputs and weights that are not float32, in words."""
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    found = {v.dtype.name.lower() for v in values if v.dtype is not None and v.dtype.is_floating_point()}
    return " and ".join(sorted(found - {"float"})) or "float32"
