"""Products in integers."""

from xform.passes.integer.quantize_products import QuantizeProducts

__all__ = ["QuantizeProducts"]
