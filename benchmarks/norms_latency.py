"""What benchmarks/norms.py shows of speed: LayerNorm against RMSNorm, alone and in whole models.

All are ratios, the time of the new form over the time of the old one, contenders taking turns: below 1 is faster.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
from norms_models import Call, randomize, transformers

from xform.backends import get_backend
from xform.backends.base import LoadOptions, LowerOptions
from xform.capture import capture_torch
from xform.errors import XformError
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve
from xform.report.latency import measure
from xform.target import Target

Array = npt.NDArray[Any]
KERNEL_SHAPES = ((1, 128, 384), (1, 197, 768), (8, 128, 768))
COPIES = 12  # of the norm in one model, so that the call itself does not count
REPEATS, KERNEL_SECONDS = 60, 8.0


def norm_chain(kind: str, shape: tuple[int, int, int]) -> ort.InferenceSession:
    """COPIES norms in a row: "layer_norm", "rms_norm" or "rms_norm_add" (with the bias as an Add)."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    value, nodes, initializers = x, [], []
    for number in range(COPIES):
        parts = []
        for part, center in (("scale", 1.0), ("bias", 0.0)):
            array = (center + 0.3 * rng.standard_normal(shape[-1])).astype(np.float32)
            parts.append(ir.Value(name=f"{part}_{number}", const_value=ir.tensor(array, name=f"{part}_{number}")))
        operator = "LayerNormalization" if kind == "layer_norm" else "RMSNormalization"
        given = [value, *parts] if kind == "layer_norm" else [value, parts[0]]
        nodes.append(ir.node(operator, given, {"axis": -1, "epsilon": 1e-5}))
        initializers += given[1:]
        if kind == "rms_norm_add":
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], parts[1]]))
            initializers.append(parts[1])
        value = nodes[-1].outputs[0]
    value.name, value.type, value.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="norms")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options)


def kernels() -> dict[str, Any]:
    """CPU time of the norms alone in ONNX Runtime, one thread: the fastest of many runs in turn."""
    rows: dict[str, Any] = {}
    for shape in KERNEL_SHAPES:
        x = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
        sessions = {kind: norm_chain(kind, shape) for kind in ("layer_norm", "rms_norm_add", "rms_norm")}
        best = dict.fromkeys(sessions, float("inf"))
        deadline = time.perf_counter() + KERNEL_SECONDS
        for _ in range(REPEATS):
            for kind, session in sessions.items():
                start = time.thread_time()
                session.run(None, x)
                best[kind] = min(best[kind], time.thread_time() - start)
            if time.perf_counter() > deadline:
                break
        rows["x".join(map(str, shape))] = {
            "layer_norm_us": 1e6 * best["layer_norm"] / COPIES,
            "rms_norm_with_add": best["rms_norm_add"] / best["layer_norm"],
            "rms_norm": best["rms_norm"] / best["layer_norm"],
        }
    return rows


def odd_width() -> dict[str, float]:
    """CPU time of a feed-forward layer, 128 tokens, width d - 1 relative to width d: what a channel less is worth."""
    rows = {}
    x = np.random.default_rng(2).standard_normal((1, 128, 768)).astype(np.float32)
    for width in (384, 768):
        sessions = {size: _feed_forward(size, 4 * width) for size in (width, width - 1)}
        best = dict.fromkeys(sessions, float("inf"))
        for _ in range(REPEATS):
            for size, session in sessions.items():
                feeds = {"x": np.ascontiguousarray(x[..., :size])}
                start = time.thread_time()
                session.run(None, feeds)
                best[size] = min(best[size], time.thread_time() - start)
        rows[f"{width - 1} to {width}"] = best[width - 1] / best[width]
    return rows


def _feed_forward(width: int, hidden: int) -> ort.InferenceSession:
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 128, width]))
    weights = [
        ir.Value(name=name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in (("up", (width, hidden)), ("down", (hidden, width)))
    ]
    up = ir.node("MatMul", [x, weights[0]])
    down = ir.node("MatMul", [up.outputs[0], weights[1]])
    y = down.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [y], nodes=[up, down], initializers=weights, opset_imports={"": 23}, name="feed_forward")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options)


def _vit(layers: int, width: int) -> torch.nn.Module:
    config = transformers.ViTConfig(
        image_size=224, patch_size=16, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, num_labels=1000,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomize(Call(transformers.ViTForImageClassification(config), ("pixel_values",)))


def _gpt2(layers: int, width: int) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=5000, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=256, use_cache=False
    )
    torch.manual_seed(0)
    return randomize(Call(transformers.GPT2LMHeadModel(config), ("input_ids",)))


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[torch.Tensor, ...]]] = {
    "deit_tiny_shape": (lambda: _vit(12, 192), (torch.zeros(1, 3, 224, 224),)),
    "gpt2_6x384": (lambda: _gpt2(6, 384), (torch.ones(1, 128, dtype=torch.int64),)),
}
FORMS: dict[str, list[str]] = {
    "layer_norm": [],
    "rms_norm": ["layer_norm_to_rms_norm"],
    "rms_norm_absorbed": ["layer_norm_to_rms_norm", "absorb_norm_affine"],
    "compressed": ["layer_norm_to_rms_norm", "compress_rms_norm"],
}


def forms(name: str) -> tuple[dict[str, ir.Model], Mapping[str, Array]]:
    """One model in all forms, and inputs."""
    make, example = MODELS[name]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        captured = capture_torch(make(), example, {})
    feeds: dict[str, Array] = {n: t.numpy() for n, t in captured.flatten(example).items()}
    canonical = run_pipeline(captured.model, resolve("exact"), verify="off").model
    made = {}
    for form, names in FORMS.items():
        options = {"compress_rms_norm": {"multiple_of": 1}} if "compress_rms_norm" in names else {}
        passes = resolve(passes=[*names, "eliminate_common_subexpressions", "infer_shapes"], options=options)
        made[form] = run_pipeline(canonical, passes, verify="off", strict=True).model
    return made, feeds


def on_onnxruntime(made: Mapping[str, ir.Model], feeds: Mapping[str, Array], rounds: int) -> dict[str, float]:
    """Ratios to the LayerNorm form, each contender in a process of its own."""
    target = Target("cpu")
    backend = get_backend("onnxruntime", target)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for form, model in made.items():
            paths.append(Path(folder, f"{form}.onnx"))
            backend.lower(model, target, LowerOptions()).save(paths[-1])
        timings = measure(paths, feeds, rounds=rounds, seconds=0.5, threads=1)
    ratios = {form: 1 / t.speedup_over(timings[0]) for form, t in zip(made, timings, strict=True)}
    return {"layer_norm_ms": timings[0].median_ms, **{k: v for k, v in ratios.items() if k != "layer_norm"}}


def on_torch(made: Mapping[str, ir.Model], feeds: Mapping[str, Array], rounds: int) -> dict[str, Any]:
    """Ratios to the LayerNorm form in the torch backend, on the GPU where there is one, in turn in one process."""
    target = Target("cuda" if torch.cuda.is_available() else "cpu")
    backend = get_backend("torch_triton", target)
    runners = {f: backend.load(backend.lower(m, target, LowerOptions()), LoadOptions(1)) for f, m in made.items()}
    device = torch.device("cuda" if target.kind == "cuda" else "cpu")
    given = {name: torch.from_numpy(np.array(array)).to(device) for name, array in feeds.items()}
    times: dict[str, list[float]] = {form: [] for form in runners}
    for number in range(rounds + 2):
        for form, runner in runners.items():
            start = time.perf_counter()
            runner.run(given)
            if target.kind == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[form].append(time.perf_counter() - start)
    base = times["layer_norm"]
    ratios = {f: statistics.median(a / b for a, b in zip(t, base, strict=True)) for f, t in times.items()}
    return {"target": target.kind, "layer_norm_ms": 1e3 * statistics.median(base),
            **{k: v for k, v in ratios.items() if k != "layer_norm"}}  # fmt: skip


def latency(rounds: int = 9) -> dict[str, Any]:
    """Every ratio of the benchmark."""
    rows: dict[str, Any] = {"onnxruntime_kernels": kernels(), "odd_width": odd_width(), "onnxruntime": {}, "torch": {}}
    print(f"kernels {rows['onnxruntime_kernels']} odd width {rows['odd_width']}", file=sys.stderr)
    for name in MODELS:
        made, feeds = forms(name)
        rows["onnxruntime"][name] = on_onnxruntime(made, feeds, rounds)
        try:
            rows["torch"][name] = on_torch(made, feeds, rounds)
        except XformError as error:
            rows["torch"][name] = {"unavailable": str(error)}
        print(f"{name} {rows['onnxruntime'][name]} torch {rows['torch'][name]}", file=sys.stderr)
    return rows
