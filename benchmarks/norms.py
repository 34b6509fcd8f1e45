"""Is every LayerNorm that the theory allows an RMSNorm afterwards, with the same numbers, and what is it worth?

For each model of norms_models.py, captured in float64 and in float32, the `exact` preset runs without and with
`layer_norm_to_rms_norm`; LayerNorms are counted against what the architecture has and what the theory leaves; outputs
are compared, in float64 by onnx's reference, in float32 by ONNX Runtime; and the mean over channels of what every
RMSNorm reads is measured in float64. BERT and three constructed traps must be refused or handled, with the right
remark. Then: equal integer codes after RepQuant's reparameterization, lower W8A8 error after SmoothQuant's migration,
the error of the compressed form, and latency ratios of LayerNorm and RMSNorm on ONNX Runtime.

    python benchmarks/norms.py --json [--only TEXT] [--no-latency] [--rounds N]

The last line is JSON: {"models": {name: {"layer_norms_before", "layer_norms_left", "expected_left", "rel_err_fp32",
"rel_err_fp64", "stream_mean", ...}}, "refused": {name: reason}, "repquant_codes_equal", "smoothquant", "compressed",
"latency_ratio", "ok"}. Exit code 1 unless ok.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
from norms_latency import latency
from norms_models import Case, cases, traps
from norms_quantization import repquant, smoothquant
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_layer_normalization import _layer_normalization
from onnx.reference.ops.op_rms_normalization import _rms_normalization

from xform.capture import capture_torch
from xform.passes.normalize import CompressRMSNorm
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve
from xform.pipeline.result import PipelineResult

Arrays = dict[str, npt.NDArray[Any]]
FP32, FP64, MEAN = 1e-5, 1e-10, 1e-12
PASS = "layer_norm_to_rms_norm"


class LayerNormalization(OpRun):  # type: ignore[misc]
    """onnx's own computes in the operand's type, which is right, and refuses a stash type that says so."""

    def _run(self, x: Any, scale: Any, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Any:
        return _layer_normalization(x, scale, bias, axis=axis, epsilon=epsilon)


class RMSNormalization(OpRun):  # type: ignore[misc]
    """As above."""

    def _run(self, x: Any, scale: Any, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Any:
        return (_rms_normalization(x, scale, axis=axis, epsilon=epsilon),)


def reference(model: ir.Model, feeds: Arrays) -> list[npt.NDArray[Any]]:
    """Outputs by onnx's reference implementation, in the types that the graph declares."""
    proto = ir.to_proto(model)
    found: list[npt.NDArray[Any]] = ReferenceEvaluator(proto, new_ops=[LayerNormalization, RMSNormalization]).run(
        None, feeds
    )
    return found


def runtime(model: ir.Model, feeds: Arrays) -> list[npt.NDArray[Any]]:
    """Outputs by ONNX Runtime with its optimizations off."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    proto = ir.to_proto(model)
    proto.ir_version = min(proto.ir_version, 10)
    found: list[npt.NDArray[Any]] = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, feeds)
    return found


def count(model: ir.Model, op_type: str) -> int:
    """Nodes of a type in the main graph."""
    return sum(node.op_type == op_type for node in model.graph)


def converted(case: Case, dtype: torch.dtype) -> tuple[ir.Model, PipelineResult, Arrays]:
    """The canonical graph, the result of the pass on it, and inputs."""
    module = case.make().to(dtype)
    if (
        dtype is torch.float64
    ):  # numbers that came from float32 have sums that are exact in float64, which proves nothing
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1 + 1e-9 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    given = tuple(t.to(dtype) if t.is_floating_point() else t for t in case.inputs(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        captured = capture_torch(module, given, {})
    feeds = {name: t.numpy() for name, t in captured.flatten(given).items()}
    canonical = run_pipeline(captured.model, resolve("exact"), verify="off").model
    # resolve("exact") again: what the pass leaves behind must survive the cleanup passes
    result = run_pipeline(canonical, resolve(passes=[PASS, *cleanup()]), verify="off")
    return canonical, result, feeds


def cleanup() -> list[str]:
    """The cleanup passes of the exact preset."""
    names = [one.name for one in resolve("exact")]
    return names[names.index("simplify_layout") :]


def relative(got: list[npt.NDArray[Any]], want: list[npt.NDArray[Any]]) -> float:
    """Largest difference over all outputs, relative to the largest number of each."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))


def stream_mean(model: ir.Model, feeds: Arrays) -> float:
    """Largest |mean over channels| of what the RMSNorms read, relative to the largest number there."""
    observed = model.clone()
    streams = {n.inputs[0]: None for n in observed.graph if n.op_type == "RMSNormalization"}
    observed.graph.outputs.extend([v for v in streams if not v.is_graph_output()])
    arrays = reference(observed, feeds)[len(model.graph.outputs) :]
    return max((float(np.abs(a.mean(-1)).max() / np.abs(a).max()) for a in arrays), default=0.0)


def examine(case: Case) -> dict[str, Any]:
    """What became of one model."""
    before, result, feeds = converted(case, torch.float64)
    before32, result32, feeds32 = converted(case, torch.float32)
    remarks = [r for r in result32.remarks if r.pass_name == PASS]
    return {
        "layer_norms_before": count(before32, "LayerNormalization"),
        "layer_norms_left": count(result32.model, "LayerNormalization"),
        "expected_left": case.expected_left,
        "rms_norms": count(result32.model, "RMSNormalization"),
        "left_in_fp64": count(result.model, "LayerNormalization"),
        "rel_err_fp32": relative(runtime(result32.model, feeds32), runtime(before32, feeds32)),
        "rel_err_fp64": relative(reference(result.model, feeds), reference(before, feeds)),
        "stream_mean": stream_mean(result.model, feeds),
        "reasons": list(dict.fromkeys(r.reason for r in remarks if r.reason)),
    }


def is_right(case: Case, row: dict[str, Any]) -> bool:
    """Whether counts are those of the theory and numbers within the limits."""
    counts = (row["layer_norms_before"], row["layer_norms_left"], row["left_in_fp64"])
    converted_all = counts == (case.layer_norms, case.expected_left, case.expected_left)
    equal = row["rel_err_fp32"] <= FP32 and row["rel_err_fp64"] <= FP64 and row["stream_mean"] <= MEAN
    return converted_all and equal and row["rms_norms"] == case.layer_norms - case.expected_left


def _batches(feeds: Arrays) -> list[Arrays]:
    """The feeds, and another batch of other numbers."""
    return [feeds, {k: v * 1.3 if v.dtype.kind == "f" else v[::-1].copy() for k, v in feeds.items()}]


def scales() -> dict[str, Any]:
    """RepQuant and SmoothQuant on a vision and a language model, with LayerNorms and with RMSNorms."""
    rows: dict[str, Any] = {}
    smooth: dict[str, Any] = {}
    for case in cases():
        if case.name not in ("vit", "gpt2"):
            continue
        canonical, result, feeds = converted(case, torch.float64)
        single, _, feeds32 = converted(case, torch.float32)
        for form, model in (("layer_norm", canonical), ("rms_norm", result.model)):
            rows[f"{case.name} {form}"] = repquant(model, _batches(feeds), reference)
            row = smoothquant(model, _batches(feeds), reference)
            lower = row["w8a8_error_after"] < 0.5 * row["w8a8_error_before"]
            smooth[f"{case.name} {form}"] = {**row, "ok": row["rel_err"] <= FP64 and lower}
        rows[f"{case.name} float32"] = repquant(single, _batches(feeds32), None)
    print(f"repquant {rows}\nsmoothquant {smooth}", file=sys.stderr)
    wide = [row for name, row in rows.items() if "float32" not in name]
    exact = all(row["norms"] and row["rel_err"] <= FP64 for row in wide)
    share = min(row["share_equal"] for row in wide) if exact else 0.0
    return {"repquant_codes_equal": share, "repquant": rows, "smoothquant": smooth}


def compressed() -> dict[str, Any]:
    """The compressed form of models whose streams allow it."""
    rows: dict[str, Any] = {}
    for case in cases():
        if case.name not in ("vit", "gpt2", "opt"):
            continue
        row: dict[str, Any] = {}
        for dtype, run, name in ((torch.float64, reference, "rel_err_fp64"), (torch.float32, runtime, "rel_err_fp32")):
            canonical, result, feeds = converted(case, dtype)
            narrow = run_pipeline(result.model, [CompressRMSNorm(1)], verify="off", strict=True).model
            row["rms_norms_left"] = count(narrow, "RMSNormalization")
            row[name] = relative(run(narrow, feeds), run(canonical, feeds))
        right = row["rms_norms_left"] == 0 and row["rel_err_fp64"] <= FP64 and row["rel_err_fp32"] <= FP32
        rows[case.name] = {**row, "ok": right}
    print(f"compressed {rows}", file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print only the JSON line on stdout")
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--no-latency", action="store_true", help="leave the timings out")
    parser.add_argument("--rounds", type=int, default=9, help="of the timings")
    arguments = parser.parse_args()
    models: dict[str, Any] = {}
    refused: dict[str, str] = {}
    ok = True
    trapped = {case.name for case in traps()}
    for case in [*cases(), *traps()]:
        if arguments.only not in case.name:
            continue
        start = time.perf_counter()
        row = examine(case)
        right = is_right(case, row)
        if case.name in trapped:
            told = [reason for reason in row["reasons"] if case.why in reason]
            refused[case.name] = told[0] if told else f"no remark says {case.why!r}: {row['reasons']}"
            right = right and bool(told)
        models[case.name] = {**row, "ok": right}
        ok = ok and right
        seconds = time.perf_counter() - start
        brief = {k: v for k, v in row.items() if k != "reasons"}
        print(f"{case.name:22} {'ok ' if right else 'BAD'} {brief} {seconds:.1f}s", file=sys.stderr)
    summary: dict[str, Any] = {"models": models, "refused": refused}
    if not arguments.only:
        summary.update(scales())
        ok = ok and summary["repquant_codes_equal"] == 1 and all(row["ok"] for row in summary["smoothquant"].values())
        summary["compressed"] = compressed()
        ok = ok and all(row["ok"] for row in summary["compressed"].values())
        summary["latency_ratio"] = None if arguments.no_latency else latency(arguments.rounds)
    print(json.dumps({**summary, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
