"""What is lowered runs on empty batches and empty sequences as the graph before it did; a crash would end the process.

Each artifact runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import apply, declared, parse

from xform.backends import LowerOptions, get_backend
from xform.passes.cleanup import EliminateCommonSubexpressions, InferShapes, RemoveDeadCode
from xform.passes.integer import QuantizeProducts, QuantizeStatic
from xform.target import Target

CPU = Target("cpu")
C, H, D = 64, 4, 16
RUN = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
with numpy.load(sys.argv[2]) as feeds:
    print(*session.run(None, dict(feeds))[0].shape)
"""
HEADS = """q = MatMul(x, wq) k0 = MatMul(x, wk) k = Add(k0, b) v = MatMul(x, wv)
    qr = Reshape(q, heads) kr = Reshape(k, heads) vr = Reshape(v, heads)
    qh = Transpose<perm=[0,2,1,3]>(qr) kh = Transpose<perm=[0,2,1,3]>(kr) vh = Transpose<perm=[0,2,1,3]>(vr)
    a = Attention<{attributes}>(qh, kh, vh{mask}) c = Transpose<perm=[0,2,1,3]>(a) r = Reshape(c, merged)
    y = MatMul(r, wo)"""
FEED_FORWARD = "h = MatMul(x, wq) a = Add(h, b) g = Gelu(a) h2 = MatMul(g, wo) s = Add(h2, x) y = MatMul(s, wk)"


def model(body: str, mask: str = "", batch: object = "n", tokens: object = "s") -> ir.Model:
    rng = np.random.default_rng(5)
    constants: dict[str, Any] = {
        **{f"w{n}": (rng.normal(size=(C, C)) / 8).astype(np.float32) for n in "qkvo"},
        "b": rng.normal(size=C).astype(np.float32),
        "heads": np.array([0, 0, H, D]),
        "merged": np.array([0, 0, C]),
    }
    text = f"g (float[{batch},{tokens},{C}] x{mask}) => (float[{batch},{tokens},{C}] y) {{ {body} }}"
    used = {name: array for name, array in constants.items() if f"{name})" in text or f"{name}," in text}
    return parse(declared(text, used), used)


def attention(attributes: str = "scale=0.25", mask: str = "") -> ir.Model:
    body = HEADS.format(attributes=attributes, mask=", m" if mask else "")
    return model(body, f", bool[{mask}] m" if mask else "")


def runs(lowered: ir.Model, folder: Path, *, batch: int, tokens: int) -> None:
    artifact = get_backend(None, CPU).lower(lowered, CPU, LowerOptions())
    path = artifact.save(folder / "model.onnx")[0]
    sizes: dict[object, int] = {"n": batch, "s": tokens}
    feeds = {}
    for value in lowered.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else sizes[d.value] for d in value.shape]
        assert value.dtype is not None
        feeds[value.name or ""] = np.ones(shape, value.dtype.numpy())
    np.savez(folder / "feeds.npz", **feeds)
    command = [sys.executable, "-c", RUN, str(path), str(folder / "feeds.npz")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, f"exit code {run.returncode}: {run.stderr[-500:]}"
    assert run.stdout.split() == [str(batch), str(tokens), str(C)]


EMPTY = [(0, 3), (2, 0), (0, 0), (2, 3)]


@pytest.mark.parametrize("batch,tokens", EMPTY)
@pytest.mark.parametrize(
    "attributes,mask",
    [
        ("scale=0.25", ""),
        ("scale=0.25, is_causal=1", ""),
        ("scale=0.25", "n,1,1,s"),
        ("scale=0.25", "n,1,s,s"),
        ("scale=0.25, is_causal=1", "n,1,1,s"),  # which QAttention cannot say
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_attention_with_its_projections(tmp_path, attributes, mask, int8, batch, tokens):
    graph = attention(attributes, mask)
    if int8:
        apply(graph, QuantizeProducts(smallest=0), EliminateCommonSubexpressions(), RemoveDeadCode(), InferShapes())
        forms = get_backend(None, CPU).lower(graph, CPU, LowerOptions()).metadata["lowered"]
        assert ("attention: QAttention" in forms) == (not mask or "causal" not in attributes)
    runs(graph, tmp_path, batch=batch, tokens=tokens)


@pytest.mark.parametrize("batch,tokens", EMPTY)
@pytest.mark.parametrize(
    "quantizer",
    [
        QuantizeProducts(smallest=0),
        QuantizeProducts(smallest=0, per_row=True),
        QuantizeStatic({}, products="grouped", group=32, smallest=0),
    ],
    ids=["dynamic", "per_row", "grouped"],
)
def test_products_in_int8(tmp_path, quantizer, batch, tokens):
    graph = model(FEED_FORWARD)
    apply(graph, quantizer, EliminateCommonSubexpressions(), RemoveDeadCode(), InferShapes())
    assert any("Quantize" in node.op_type for node in graph.graph)
    runs(graph, tmp_path, batch=batch, tokens=tokens)


def test_a_batch_that_is_never_empty_has_no_branch():
    graph = model(HEADS.format(attributes="scale=0.25", mask=""), batch=2, tokens=3)
    apply(graph, QuantizeProducts(smallest=0), EliminateCommonSubexpressions(), RemoveDeadCode(), InferShapes())
    lowered = get_backend(None, CPU).lower(graph, CPU, LowerOptions())
    assert "QAttention" in lowered.metadata["operators"] and "If" not in lowered.metadata["operators"]
