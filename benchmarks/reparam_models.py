"""Training-form timm models for benchmarks/reparam.py, and one through the whole measurement."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

# isort: off
import zoo.vision_stub  # noqa: F401  must come before timm
import timm
# isort: on

import onnx_ir as ir
import onnxruntime
import torch
from reparam_graphs import (
    CANONICAL,
    REPARAMETERIZE,
    batch_norms,
    linear_ops,
    relative_error,
    rerun_changes,
    to_float32,
    unfoldable,
)
from timm.utils.model import reparameterize_model
from zoo.float64 import evaluate
from zoo.randomize import randomize

import xform
from xform.capture import capture_torch
from xform.graph.write import save
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve

NAMED = (
    "repvgg_a0",
    "mobileone_s0",
    "mobileone_s1",
    "repvit_m0_9",
    "fastvit_t8",
    "fastvit_sa12",
    "efficientvit_b0",
    "efficientvit_b1",
    "efficientvit_m0",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "ghostnet_050",
    "ghostnetv2_100",
    "ghostnetv3_050",
    "resnet18",
    "convnext_tiny",
    "levit_128s",
)
OWN_CHOICE = (
    "mobilenetv4_conv_small",
    "repghostnet_050",
    "tiny_vit_5m_224",
    "swiftformer_xs",
    "poolformer_s12",
    "densenet121",
)
MODELS = NAMED + OWN_CHOICE


def build(variant: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A variant with random weights as it is trained, in evaluation mode and float64, and an image batch of one."""
    torch.manual_seed(0)
    module = randomize(timm.create_model(variant, pretrained=False)).eval().double()
    return module, torch.randn(1, *module.pretrained_cfg["input_size"], dtype=torch.float64)


def measure(variant: str, folder: Path, captures: Path | None) -> dict[str, Any]:
    """All figures of one model but its latency; `before.onnx` and `after.onnx` are left in `folder` for that.

    Args:
        captures: Folder to keep captured graphs in and to read them from, to save time on later runs.
    """
    torch.set_num_threads(1)
    module, image = build(variant)
    with torch.no_grad():
        expected = [module(image).numpy()]
    captured = _captured(variant, module, image, captures)
    figures: dict[str, Any] = {"linear_ops_training": linear_ops(_canonical(captured))}
    figures["linear_ops_reference"] = _reference(variant, module, image, captures, figures["linear_ops_training"])
    feeds = {captured.graph.inputs[0].name or "": image.numpy()}

    result = run_pipeline(captured, resolve("exact"), verify="off")
    exact = evaluate(captured, feeds)
    figures["rel_err_fp64"] = relative_error(evaluate(result.model, feeds), exact)
    figures["rel_err_fp64_capture"] = relative_error(exact, expected)

    single = to_float32(captured)
    narrow = {name: array.astype("float32") for name, array in feeds.items()}
    figures["rel_err_fp32_training"] = relative_error(_run(single, narrow), expected)
    optimized = xform.optimize(single, verify="off")
    figures["rel_err_fp32"] = relative_error(list(optimized(narrow).values()), expected)
    left = batch_norms(optimized.graph)
    figures["batch_norms_left"] = len(left)
    figures["batch_norms_unfoldable"] = unfoldable(optimized.graph, optimized.report.remarks)
    figures["linear_ops"] = linear_ops(optimized.graph)
    figures["nodes"] = len(list(optimized.graph.graph))
    figures["rewrite_seconds"] = sum(p.seconds for p in optimized.report.passes if p.name in REPARAMETERIZE)
    figures["rolled_back"] = [p.name for p in optimized.report.passes if p.status == "rolled_back"]
    figures["rerun_changes"] = rerun_changes(optimized.graph)
    figures["inputs"] = {name: list(array.shape) for name, array in narrow.items()}
    save(single, folder / "before.onnx")
    optimized.save(folder / "after.onnx")
    return figures


def _captured(name: str, module: torch.nn.Module, image: torch.Tensor, captures: Path | None) -> ir.Model:
    path = None if captures is None else captures / f"{name}.onnx"
    if path is not None and path.exists():
        return ir.load(path)
    start = time.perf_counter()
    model = capture_torch(module, (image,)).model
    if path is not None and captures is not None:
        captures.mkdir(parents=True, exist_ok=True)
        save(model, path)
        path.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.1f}\n")
    return model


def _canonical(model: ir.Model) -> ir.Model:
    """`model` with every pass of the preset but the reparameterization."""
    return run_pipeline(model, resolve(passes=CANONICAL), verify="off").model


def _reference(name: str, module: torch.nn.Module, image: torch.Tensor, captures: Path | None, training: int) -> int:
    """Linear operators of timm's own reparameterized form, or of the training form where timm changes nothing."""
    fused = reparameterize_model(copy.deepcopy(module).float()).eval().double()  # it makes float32 biases
    kinds = [[type(m) for m in one.modules()] for one in (fused, module)]
    if kinds[0] == kinds[1]:
        return training
    return linear_ops(_canonical(_captured(f"{name}.reference", fused, image, captures)))


def _run(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))
