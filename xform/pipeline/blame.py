"""Whose fault an unexpected exception is: xform's, or a model's that no runtime accepts."""

from __future__ import annotations

import onnx_ir as ir

from xform.errors import ModelError
from xform.pipeline.verify import Verifier


def blamed(model: ir.Model, error: Exception) -> Exception:
    """What to raise in place of `error`, which some step raised while it worked on `model`.

    Checks at capture do not type every node (ONNX's own inference refuses models that run), so a damaged model can get
    as far as a rule that trusts the types. If ONNX Runtime does not load the captured model, or runs it on no inputs,
    the model is at fault: a ModelError with the runtime's reason. Otherwise `error` itself, a bug.
    """
    if isinstance(error, MemoryError):
        return ModelError(
            f"the model needs more memory than there is: {error or 'allocation failed'}",
            hint="check the sizes of its dimensions, or run with verify='off'",
        )
    verifier = Verifier(model)
    verifier.prepare()
    if verifier.cases:
        return error
    return ModelError(
        f"the model does not run, and optimizing it failed ({type(error).__name__}): {verifier.unverifiable}",
        hint="the file is damaged, or needs inputs that cannot be guessed; check that ONNX Runtime runs it",
    )
