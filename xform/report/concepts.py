"""Which semantic operators a graph contains, by the concept that users know them by."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from xform.graph.values import display_name, is_op
from xform.rewrite.remarks import Remark

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
    "sigmoid": (("", "Sigmoid"),),
    "hard_sigmoid": (("", "HardSigmoid"),),
    "softmax": (("", "Softmax"),),
    "rotary": (("", "RotaryEmbedding"), ("com.microsoft", "RotaryEmbedding")),
    "linear": (("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul"), ("com.microsoft", "FusedGemm")),
    "conv": (("", "Conv"), ("com.microsoft", "FusedConv"), ("com.microsoft", "NhwcFusedConv")),
}

COUNTED = (*CONCEPTS, "int8")  # what `count_concepts` counts

# What rules are about besides: not something that one operator is.
TOPICS = ("reparameterization", "int8", "layout", "rows", "cleanup", "tuning", "capture", "padding")
ALIASES: Mapping[str, str] = {"convolution": "conv", "batchnorm": "batch_norm", "layernorm": "layer_norm"}

_BY_OP = {key: concept for concept, keys in CONCEPTS.items() for key in keys}
_INTEGER = frozenset(
    {
        ("", "MatMulInteger"),
        ("", "ConvInteger"),
        ("", "QLinearMatMul"),
        ("", "QLinearConv"),
        ("com.microsoft", "QAttention"),
        ("com.microsoft", "QGemm"),
        ("com.microsoft", "DynamicQuantizeMatMul"),
        ("com.microsoft", "MatMulIntegerToFloat"),
    }
)


def count_concepts(model: ir.Model) -> dict[str, int]:
    """Number of nodes of each concept in `model`, subgraphs included; concepts that do not occur are left out.

    A SiLU is a `Swish` or the pair `Mul(x, Sigmoid(x))`, since ONNX has the operator only from opset 24 on. "int8"
    counts products on integers, as one operator or as a float one whose weight is decoded from 8 bits.
    """
    return dict(Counter(concept for node in model.graph.all_nodes() for concept in concepts_of(node)))


def concepts_of(node: ir.Node) -> Iterator[str]:
    """The concepts that a node is one of."""
    key = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
    if _is_silu(node):
        yield "silu"
    elif key in _BY_OP and not (key == ("", "Sigmoid") and _gates_itself(node)):
        yield _BY_OP[key]
    if key in _INTEGER or _is_quantized_product(node):
        yield "int8"


def places(model: ir.Model, concept: str) -> list[str]:
    """Original names of the nodes of a concept, in order."""
    return [display_name(node) for node in model.graph.all_nodes() if concept in concepts_of(node)]


def with_concepts(remarks: Iterable[Remark], captured: ir.Model) -> list[Remark]:
    """Remarks that also know which concepts the nodes they name were in the captured model.

    A rule has one concept of its own, which says what it makes; what it takes in, a BatchNormalization for one, only
    its nodes tell.
    """
    known: dict[str, set[str]] = defaultdict(set)
    for node in captured.graph.all_nodes():
        known[display_name(node)].update(concepts_of(node))
    return [
        replace(
            remark,
            concept=ALIASES.get(remark.concept, remark.concept),
            touches=tuple(sorted({c for name in remark.nodes for c in known.get(name, ())})),
        )
        for remark in remarks
    ]


def count_op_types(model: ir.Model) -> dict[str, int]:
    """Number of nodes of each operator type, the domain in front where it is not ONNX's own."""
    return dict(Counter(op_name(node) for node in model.graph.all_nodes()))


def op_name(node: ir.Node) -> str:
    """Operator of a node as users write it: `Conv`, `com.microsoft.FusedConv`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _is_silu(node: ir.Node) -> bool:
    if not is_op(node, "Mul") or len(node.inputs) != 2:
        return False
    x, gate = node.inputs
    for value, sigmoid in ((x, gate), (gate, x)):
        producer = sigmoid.producer() if sigmoid is not None else None
        if producer is not None and is_op(producer, "Sigmoid") and producer.inputs[0] is value:
            return True
    return False


def _gates_itself(node: ir.Node) -> bool:
    """Whether a Sigmoid is part of a SiLU."""
    return any(_is_silu(use.node) for use in node.outputs[0].uses())


def _is_quantized_product(node: ir.Node) -> bool:
    """Whether the weight of a float product or convolution is decoded from 8 bits."""
    if not is_op(node, "MatMul", "Gemm", "Conv", "ConvTranspose") or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    decode = node.inputs[1].producer()
    codes = decode.inputs[0] if decode is not None and is_op(decode, "DequantizeLinear") else None
    return codes is not None and codes.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
