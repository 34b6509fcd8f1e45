"""Models for the scale benchmark: a large Llama-shaped ONNX written layer by layer, and graphs of N nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder of the Llama family; the default has 1.35 billion parameters."""

    layers: int = 24
    hidden: int = 2048
    heads: int = 16
    intermediate: int = 5504
    vocabulary: int = 32_000

    @property
    def parameters(self) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


@dataclass
class Writer:
    """Collects nodes and small constants; large weights go straight to the data file.

    Every weight is a random block times a number of its own, so that no two are equal and none takes long to make.
    """

    data: BinaryIO | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    parameters: int = 0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._block = self._random.standard_normal(1 << 20).astype(np.float32)

    def add(self, op: str, *inputs: str, name: str, outputs: int = 1, **attributes: Any) -> Any:
        """One node; the name of its output, or names of its outputs."""
        names = [f"{name}.{i}" for i in range(outputs)] if outputs > 1 else [name]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"node.{name}", **attributes))
        return names if outputs > 1 else name

    def constant(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """A random weight, in the data file if there is one."""
        size = int(np.prod(shape))
        self.parameters += size
        scale = np.float32(self._random.uniform(0.5, 1.5) / np.sqrt(shape[0]))
        if self.data is None:
            array = np.resize(np.roll(self._block, len(self.initializers)), size) * scale
            return self.constant(name, array.reshape(shape))
        start = self.data.tell()
        for position in range(0, size, self._block.size):
            self.data.write((self._block[: size - position] * scale).tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        entries = {"location": "llama.data", "offset": start, "length": 4 * size}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "scale", inputs, outputs, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def write_llama(folder: Path, shape: LlamaShape | None = None) -> tuple[Path, int]:
    """Write `llama.onnx` and `llama.data` (4 bytes a parameter) to `folder`; the path and the number of parameters.

    Norms, rotary embedding, attention and SwiGLU are spelled in primitive operators, as exporters at opset 17 do.
    """
    shape = shape or LlamaShape()
    path = folder / "llama.onnx"
    with (folder / "llama.data").open("wb") as data:
        writer = Writer(data)
        _llama_constants(writer, shape)
        x = writer.add(
            "Gather", writer.weight("embed.weight", shape.vocabulary, shape.hidden), "input_ids", name="embed"
        )
        for layer in range(shape.layers):
            x = _llama_layer(writer, f"layers.{layer}", x, shape)
        x = _rms_norm(writer, "norm", x, shape.hidden)
        writer.add("MatMul", x, writer.weight("lm_head.weight", shape.hidden, shape.vocabulary), name="logits")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", shape.vocabulary])
    path.write_bytes(writer.model([ids], [logits]).SerializeToString())
    return path, writer.parameters


def _llama_constants(writer: Writer, shape: LlamaShape) -> None:
    head = shape.hidden // shape.heads
    for name, value in {"two": 2.0, "epsilon": 1e-5, "scale": np.sqrt(head), "lowest": -1e9}.items():
        writer.constant(name, np.float32(value))
    writer.constant("zero", np.int64(0))
    writer.constant("one", np.int64(1))
    writer.constant("axis0", np.array([0]))
    writer.constant("axis1", np.array([1]))
    writer.constant("axes", np.array([0, 1]))
    writer.constant("start", np.array([0]))
    writer.constant("half", np.array([head // 2]))
    writer.constant("end", np.array([2**31]))
    writer.constant("last", np.array([-1]))
    writer.constant("split_heads", np.array([0, 0, shape.heads, head]))
    writer.constant("merge_heads", np.array([0, 0, shape.hidden]))
    angles = 10000.0 ** (-np.arange(0, head, 2) / head)
    writer.constant("frequencies", angles.astype(np.float32)[None])
    length = writer.add("Gather", writer.add("Shape", "input_ids", name="shape"), "one", name="length")
    positions = writer.add("Range", "zero", length, "one", name="positions")
    column = writer.add("Unsqueeze", positions, "axis1", name="column")
    angle = writer.add("Mul", writer.add("Cast", column, name="float", to=1), "frequencies", name="angle")
    both = writer.add("Concat", angle, angle, name="angles", axis=-1)
    for table in ("Cos", "Sin"):
        writer.add("Unsqueeze", writer.add(table, both, name=table), "axes", name=table.lower())
    row = writer.add("Unsqueeze", positions, "axis0", name="row")
    masked = writer.add("Where", writer.add("Greater", row, column, name="later"), "lowest", "f0", name="masked")
    writer.constant("f0", np.float32(0))
    writer.add("Unsqueeze", masked, "axes", name="mask")


def _rms_norm(writer: Writer, name: str, x: str, size: int) -> str:
    square = writer.add("Pow", x, "two", name=f"{name}.square")
    mean = writer.add("ReduceMean", square, name=f"{name}.mean", axes=[-1], keepdims=1)
    root = writer.add("Sqrt", writer.add("Add", mean, "epsilon", name=f"{name}.eps"), name=f"{name}.root")
    normal = writer.add("Div", x, root, name=f"{name}.normal")
    return str(writer.add("Mul", normal, writer.weight(f"{name}.weight", size), name=f"{name}.out"))


def _rotary(writer: Writer, name: str, x: str) -> str:
    first = writer.add("Slice", x, "start", "half", "last", name=f"{name}.first")
    second = writer.add("Slice", x, "half", "end", "last", name=f"{name}.second")
    turned = writer.add("Concat", writer.add("Neg", second, name=f"{name}.neg"), first, name=f"{name}.turned", axis=-1)
    parts = [writer.add("Mul", a, t, name=f"{name}.{t}") for a, t in ((x, "cos"), (turned, "sin"))]
    return str(writer.add("Add", *parts, name=f"{name}.out"))


def _llama_layer(writer: Writer, name: str, x: str, shape: LlamaShape) -> str:
    h = _rms_norm(writer, f"{name}.norm1", x, shape.hidden)
    heads = {}
    for part in "qkv":
        made = writer.add(
            "MatMul", h, writer.weight(f"{name}.{part}.weight", shape.hidden, shape.hidden), name=f"{name}.{part}"
        )
        split = writer.add("Reshape", made, "split_heads", name=f"{name}.{part}.split")
        heads[part] = writer.add("Transpose", split, name=f"{name}.{part}.heads", perm=[0, 2, 1, 3])
    q, k = (_rotary(writer, f"{name}.{part}.rotary", heads[part]) for part in "qk")
    turned = writer.add("Transpose", k, name=f"{name}.kt", perm=[0, 1, 3, 2])
    logits = writer.add("Div", writer.add("MatMul", q, turned, name=f"{name}.qk"), "scale", name=f"{name}.scaled")
    scores = writer.add(
        "Softmax", writer.add("Add", logits, "mask", name=f"{name}.masked"), name=f"{name}.scores", axis=-1
    )
    mixed = writer.add("MatMul", scores, heads["v"], name=f"{name}.mixed")
    back = writer.add("Transpose", mixed, name=f"{name}.back", perm=[0, 2, 1, 3])
    merged = writer.add("Reshape", back, "merge_heads", name=f"{name}.merged")
    out = writer.add("MatMul", merged, writer.weight(f"{name}.o.weight", shape.hidden, shape.hidden), name=f"{name}.o")
    x = writer.add("Add", x, out, name=f"{name}.residual1")
    h = _rms_norm(writer, f"{name}.norm2", x, shape.hidden)
    gate, up = (
        writer.add(
            "MatMul", h, writer.weight(f"{name}.{p}.weight", shape.hidden, shape.intermediate), name=f"{name}.{p}"
        )
        for p in ("gate", "up")
    )
    swish = writer.add("Mul", gate, writer.add("Sigmoid", gate, name=f"{name}.sigmoid"), name=f"{name}.swish")
    inner = writer.add("Mul", swish, up, name=f"{name}.inner")
    down = writer.add(
        "MatMul", inner, writer.weight(f"{name}.down.weight", shape.intermediate, shape.hidden), name=f"{name}.down"
    )
    return str(writer.add("Add", x, down, name=f"{name}.residual2"))


def synthetic(nodes: int, width: int = 8) -> onnx.ModelProto:
    """A graph of about `nodes` nodes in blocks that give every cleanup and raising rule something to look at.

    Blocks: a linear layer with GELU (erf), a decomposed layer norm, a convolution-free residual with shape arithmetic
    and a no-op Reshape, twice the same subexpression, and constant arithmetic.
    """
    writer = Writer()
    for name, value in {"two": 2.0, "eps": 1e-5, "root2": np.sqrt(2.0), "one": 1.0, "half": 0.5}.items():
        writer.constant(name, np.float32(value))
    writer.constant("last", np.array([width]))
    blocks: tuple[Callable[[Writer, str, str, int], str], ...] = (_mlp, _layer_norm, _shapes, _duplicates)
    x, number = "x", 0
    while len(writer.nodes) < nodes:
        x = blocks[number % len(blocks)](writer, f"b{number}", x, width)
        number += 1
    writer.add("Identity", x, name="y")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", width]) for name in ("x", "y")]
    return writer.model(info[:1], info[1:])


def _mlp(writer: Writer, name: str, x: str, width: int) -> str:
    product = writer.add("MatMul", x, writer.weight(f"{name}.w", width, width), name=f"{name}.product")
    h = writer.add("Add", product, writer.weight(f"{name}.b", width), name=f"{name}.sum")
    erf = writer.add("Erf", writer.add("Div", h, "root2", name=f"{name}.scaled"), name=f"{name}.erf")
    gate = writer.add("Add", erf, "one", name=f"{name}.gate")
    gelu = writer.add("Mul", writer.add("Mul", h, gate, name=f"{name}.gated"), "half", name=f"{name}.gelu")
    return str(writer.add("Add", x, gelu, name=f"{name}.out"))


def _layer_norm(writer: Writer, name: str, x: str, width: int) -> str:
    mean = writer.add("ReduceMean", x, name=f"{name}.mean", axes=[-1], keepdims=1)
    centered = writer.add("Sub", x, mean, name=f"{name}.centered")
    square = writer.add("Pow", centered, "two", name=f"{name}.square")
    variance = writer.add("ReduceMean", square, name=f"{name}.variance", axes=[-1], keepdims=1)
    root = writer.add("Sqrt", writer.add("Add", variance, "eps", name=f"{name}.eps"), name=f"{name}.root")
    normal = writer.add("Div", centered, root, name=f"{name}.normal")
    scaled = writer.add("Mul", normal, writer.weight(f"{name}.gamma", width), name=f"{name}.scaled")
    return str(writer.add("Add", scaled, writer.weight(f"{name}.beta", width), name=f"{name}.out"))


def _shapes(writer: Writer, name: str, x: str, width: int) -> str:
    del width
    shape = writer.add("Shape", x, name=f"{name}.shape", start=0, end=2)
    target = writer.add("Concat", shape, "last", name=f"{name}.target", axis=0)
    same = writer.add("Reshape", x, target, name=f"{name}.same")
    there = writer.add("Transpose", same, name=f"{name}.there", perm=[0, 2, 1])
    back = writer.add("Transpose", there, name=f"{name}.back", perm=[0, 2, 1])
    return str(writer.add("Identity", back, name=f"{name}.out"))


def _duplicates(writer: Writer, name: str, x: str, width: int) -> str:
    del width
    twice = [writer.add("Sigmoid", x, name=f"{name}.s{i}") for i in range(2)]
    factor = writer.add("Mul", "half", "root2", name=f"{name}.factor")
    scaled = [writer.add("Mul", s, factor, name=f"{name}.m{i}") for i, s in enumerate(twice)]
    return str(writer.add("Add", *scaled, name=f"{name}.out"))


def total_bytes(paths: Iterable[Path]) -> int:
    """Bytes of the files that exist among `paths`."""
    return sum(path.stat().st_size for path in paths if path.exists())
