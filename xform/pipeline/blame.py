"""Whose fault an unexpected exception is: xform's, or a model's that no runtime accepts."""

from __future__ import annotations

import onnx_ir as ir

from xform.errors import ModelError
from xform.pipeline.oracle import CouldNotRunError, Session


def blamed(model: ir.Model, error: Exception) -> Exception:
    """What to raise in place of `error`, which some step raised while it worked on `model`.

    Checks at capture do not type every node (ONNX's own inference refuses models that run), so a damaged model can get
    as far as a rule that trusts the types. If ONNX Runtime does not load the captured model either, the model is at
    fault: a ModelError with the runtime's reason. Otherwise `error` itself, a bug.
    """
    if isinstance(error, MemoryError):
        return ModelError(
            f"the model needs more memory than there is: {error or 'allocation failed'}",
            hint="check the sizes of its dimensions, or run with verify='off'",
        )
    try:
        Session(model, threads=1).close()
    except CouldNotRunError as refusal:
        return ModelError(f"the model is not valid: {refusal.what}", hint="the file is damaged; export it again")
    return error
