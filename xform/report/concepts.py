"""Which semantic operators a graph contains, by the concept that users know them by."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from xform.graph.values import is_op

# A concept holds the ONNX operator and the forms of it that ONNX Runtime runs (domain com.microsoft).
CONCEPTS: dict[str, tuple[tuple[str, str], ...]] = {
    "attention": (
        ("", "Attention"),
        ("com.microsoft", "Attention"),
        ("com.microsoft", "MultiHeadAttention"),
        ("com.microsoft", "GroupQueryAttention"),
        ("com.microsoft", "PackedMultiHeadAttention"),
    ),
    "layer_norm": (
        ("", "LayerNormalization"),
        ("com.microsoft", "SkipLayerNormalization"),
        ("com.microsoft", "EmbedLayerNormalization"),
    ),
    "rms_norm": (
        ("", "RMSNormalization"),
        ("", "SimplifiedLayerNormalization"),
        ("com.microsoft", "SimplifiedLayerNormalization"),
        ("com.microsoft", "SkipSimplifiedLayerNormalization"),
    ),
    "group_norm": (("", "GroupNormalization"), ("com.microsoft", "GroupNorm")),
    "instance_norm": (("", "InstanceNormalization"),),
    "batch_norm": (("", "BatchNormalization"),),
    "gelu": (
        ("", "Gelu"),
        ("com.microsoft", "Gelu"),
        ("com.microsoft", "FastGelu"),
        ("com.microsoft", "BiasGelu"),
    ),
    "silu": (("", "Swish"), ("com.microsoft", "QuickGelu")),
    "hard_swish": (("", "HardSwish"),),
    "mish": (("", "Mish"),),
    "relu": (("", "Relu"),),
    "softmax": (("", "Softmax"),),
    "rotary": (("", "RotaryEmbedding"), ("com.microsoft", "RotaryEmbedding")),
    "linear": (("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul"), ("com.microsoft", "FusedGemm")),
    "conv": (("", "Conv"), ("com.microsoft", "FusedConv"), ("com.microsoft", "NhwcFusedConv")),
    "int8": (  # and products of floats that read codes through DequantizeLinear
        ("", "MatMulInteger"),
        ("", "ConvInteger"),
        ("", "QLinearMatMul"),
        ("", "QLinearConv"),
        ("com.microsoft", "DynamicQuantizeMatMul"),
        ("com.microsoft", "MatMulIntegerToFloat"),
        ("com.microsoft", "QAttention"),
        ("com.microsoft", "QGemm"),
    ),
}

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_CODES = (ir.DataType.INT8, ir.DataType.UINT8)

_BY_OP = {key: concept for concept, keys in CONCEPTS.items() for key in keys}


def count_concepts(model: ir.Model) -> dict[str, int]:
    """Number of nodes of each concept in `model`, subgraphs included; concepts that do not occur are left out.

    A product or convolution with a weight in int8 counts as "int8", besides "linear" or "conv" where its operator is
    one. A SiLU is a `Swish` or the pair `Mul(x, Sigmoid(x))`, since ONNX has the operator only from opset 24 on.
    """
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        key = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        concept = _BY_OP.get(key)
        if _reads_codes(node):
            counts["int8"] += 1
        if concept is None and _is_silu(node):
            concept = "silu"
        if concept is not None:
            counts[concept] += 1
    return dict(counts)


def count_op_types(model: ir.Model) -> dict[str, int]:
    """Number of nodes of each operator type, the domain in front where it is not ONNX's own."""
    return dict(Counter(op_name(node) for node in model.graph.all_nodes()))


def op_name(node: ir.Node) -> str:
    """Operator of a node as users write it: `Conv`, `com.microsoft.FusedConv`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _reads_codes(node: ir.Node) -> bool:
    """Whether the weight of a product or convolution is decoded from 8 bits."""
    if not is_op(node, *_PRODUCTS) or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    decode = node.inputs[1].producer()
    codes = decode.inputs[0] if decode is not None and is_op(decode, "DequantizeLinear") else None
    return codes is not None and codes.dtype in _CODES


def _is_silu(node: ir.Node) -> bool:
    if not is_op(node, "Mul") or len(node.inputs) != 2:
        return False
    x, gate = node.inputs
    for value, sigmoid in ((x, gate), (gate, x)):
        producer = sigmoid.producer() if sigmoid is not None else None
        if producer is not None and is_op(producer, "Sigmoid") and producer.inputs[0] is value:
            return True
    return False
