"""Let equal constants be one initializer.

Wraps onnx-ir's DeduplicateInitializersPass, which compares bytes. (Its hashing sibling cannot read bfloat16.) Constants
above the size limit are not even loaded: exporters already share tied weights, so small ones are what repeats.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass

from xform.passes.cleanup.library import LibraryPass


@dataclass(frozen=True)
class DeduplicateInitializers(LibraryPass):
    """Merge equal initializers.

    Attributes:
        size_limit: Largest number of elements that is compared.
    """

    name = "deduplicate_initializers"
    size_limit: int = 65536

    def apply(self, model: ir.Model) -> bool:
        return bool(DeduplicateInitializersPass(size_limit=self.size_limit)(model).modified)
