"""Products in integers."""

from xform.passes.integer.approximate_gelu import ApproximateGelu
from xform.passes.integer.quantize_products import QuantizeProducts
from xform.passes.integer.quantize_static import QuantizeStatic
from xform.passes.integer.scale_channels import ScaleChannels
from xform.passes.integer.shift_channels import ShiftChannels

Quantizer = QuantizeProducts | QuantizeStatic

__all__ = ["ApproximateGelu", "QuantizeProducts", "QuantizeStatic", "Quantizer", "ScaleChannels", "ShiftChannels"]
