"""Copying a model: new graphs, nodes and values, the same tensors."""

from __future__ import annotations

import gc

import onnx_ir as ir

SOURCE_OPSET = "xform.source_opset"  # key in model.meta: the default-domain opset that the user's model had


def clone(model: ir.Model) -> ir.Model:
    """A copy of `model` that shares its tensors; `meta` of the model is kept, which `ir.Model.clone` drops."""
    collecting = gc.isenabled()
    gc.disable()  # copying makes no garbage, and scanning a growing graph over and over takes two thirds of the time
    try:
        copy = model.clone()
    finally:
        if collecting:
            gc.enable()
    copy.meta.update(model.meta)
    return copy


def source_opset(model: ir.Model) -> int:
    """The default-domain opset that the user's model had, or the model's own where that is unknown."""
    return int(model.meta.get(SOURCE_OPSET, model.opset_imports.get("", 0)))
