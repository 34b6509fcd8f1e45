"""Does raising find every semantic operator, whichever exporter, opset and attention implementation a graph came from?

Exports the models of raising_models.py with the TorchScript exporter at opset 17 and with the dynamo exporter at 18, 20
and 23, with eager and sdpa attention; runs the `exact` preset on each; counts attentions, norms, activations and rotary
embeddings against what the architecture has; and compares numbers with the export itself, at two sizes.

    python benchmarks/raising.py --json [--cache DIR] [--only TEXT]

Exports take about ten minutes and are kept under --cache, so that another run takes about a minute. The last line is
JSON: {"expected", "found", "missed", "surplus", "unequal", "not_exported", "families"}. Exit code 1 unless everything
that was exported is found and equal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from raising_models import Arrays, Family, export, families

from xform.capture.onnx_file import capture_onnx
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve

TOLERANCE = 1e-5
VARIANTS = [
    (exporter, opset, attention)
    for attention in ("eager", "sdpa")
    for exporter, opset in (("torchscript", 17), ("dynamo", 18), ("dynamo", 20), ("dynamo", 23))
]


@dataclass
class Outcome:
    """What came of one export.

    Attributes:
        found: Concept -> operators counted.
        error: Largest relative difference to the export's numbers over all sizes.
        dynamic: Whether the export has dynamic axes.
        reasons: Missed remarks.
    """

    found: dict[str, int]
    error: float
    dynamic: bool
    reasons: list[str] = field(default_factory=list)


def count(model: ir.Model) -> dict[str, int]:
    """Semantic operators in the main graph."""
    found: Counter[str] = Counter()
    for node in model.graph:
        match node.op_type:
            case "Attention":
                found["attention"] += 1
            case "LayerNormalization":
                found["layer_norm"] += 1
            case "RMSNormalization":
                found["rms_norm"] += 1
            case "RotaryEmbedding":
                found["rotary"] += 1
            case "Relu":
                found["relu"] += 1
            case "Gelu":
                tanh = node.attributes.get_string("approximate", "none") == "tanh"
                found["gelu_tanh" if tanh else "gelu"] += 1
            case "Mul" if _is_silu(node):
                found["silu"] += 1
    return dict(found)


def _is_silu(node: ir.Node) -> bool:
    gate = node.inputs[1].producer() if node.inputs[1] is not None else None
    return gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is node.inputs[0]


def run(proto: onnx.ModelProto, feeds: list[Arrays]) -> list[npt.NDArray[Any]]:
    """Outputs by ONNX Runtime with its optimizations off, or by onnx's reference where a kernel refuses the model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [session.run(None, feed)[0] for feed in feeds]
    except Exception as error:
        print(f"    ONNX Runtime refuses it, so the reference runs it: {str(error)[:150]}", file=sys.stderr)
        reference = ReferenceEvaluator(proto)
        return [np.asarray(reference.run(None, feed)[0]) for feed in feeds]


def examine(family: Family, path: Path, dynamic: bool) -> Outcome:
    """Optimize one export, count, and compare."""
    captured = capture_onnx(path)
    result = run_pipeline(captured, resolve("exact"), verify="off")
    sizes = family.sizes if dynamic else family.sizes[:1]
    feeds = [family.arrays(size, seed) for seed, size in enumerate(sizes)]
    proto = ir.to_proto(result.model)
    proto.ir_version = min(proto.ir_version, 10)
    pairs = zip(run(onnx.load(path), feeds), run(proto, feeds), strict=True)
    error = max(float(np.abs(a - b).max() / np.abs(a).max()) if a.shape == b.shape else np.inf for a, b in pairs)
    reasons = [f"{r.rule}: {r.reason}" for r in result.remarks if r.verdict == "missed" and r.concept]
    return Outcome(count(result.model), error, dynamic, reasons)


def exported(family: Family, variant: tuple[str, int, str], cache: Path) -> tuple[Path, bool] | str:
    """The export's file and whether it is dynamic, from the cache or made now; or why there is none."""
    exporter, opset, attention = variant
    path = cache / f"{family.name}-{attention}-{exporter}-{opset}.onnx"
    note = path.with_suffix(".json")
    if not note.exists():
        try:
            made = export(family, exporter, opset, attention, path)
            note.write_text(json.dumps(asdict(made)))
        except RuntimeError as error:
            note.write_text(json.dumps({"error": str(error)}))
    found = json.loads(note.read_text())
    return found["error"] if "error" in found else (path, bool(found["dynamic"]))


def summarize(
    outcomes: Mapping[tuple[str, str], Outcome], not_exported: Mapping[str, str], known: Mapping[str, Family]
) -> dict[str, Any]:
    """The JSON line."""
    missed, surplus, unequal = [], [], []
    per_family: dict[str, dict[str, Any]] = {}
    for (name, variant), outcome in outcomes.items():
        row = per_family.setdefault(name, {"exports": 0, "dynamic": 0, "expected": 0, "found": 0, "max_error": 0.0})
        row["exports"] += 1
        row["dynamic"] += outcome.dynamic
        row["max_error"] = max(row["max_error"], outcome.error)
        for concept, expected in known[name].expected.items():
            found = outcome.found.get(concept, 0)
            row["expected"] += expected
            row["found"] += min(found, expected)
            if found < expected:
                text = {"export": f"{name} {variant}", "concept": concept, "expected": expected, "found": found}
                missed.append({**text, "reasons": outcome.reasons[:4]})
        surplus += [
            {"export": f"{name} {variant}", "concept": concept, "found": found}
            for concept, found in outcome.found.items()
            if found > known[name].expected.get(concept, 0)
        ]
        if not outcome.error <= TOLERANCE:
            unequal.append({"export": f"{name} {variant}", "error": outcome.error})
    return {
        "expected": sum(row["expected"] for row in per_family.values()),
        "found": sum(row["found"] for row in per_family.values()),
        "exports": len(outcomes),
        "missed": missed,
        "surplus": surplus,
        "unequal": unequal,
        "not_exported": dict(not_exported),
        "families": per_family,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print only the JSON line on stdout")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "xform-raising", help="for exports")
    parser.add_argument("--only", default="", help="run exports whose name contains this text")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    known = {family.name: family for family in families()}
    outcomes: dict[tuple[str, str], Outcome] = {}
    not_exported: dict[str, str] = {}
    for family in known.values():
        for variant in VARIANTS:
            label = " ".join(map(str, variant))
            if arguments.only not in f"{family.name} {label}":
                continue
            start = time.perf_counter()
            source = exported(family, variant, arguments.cache)
            if isinstance(source, str):
                not_exported[f"{family.name} {label}"] = source
                print(f"{family.name:16} {label:22} not exported: {source[:100]}", file=sys.stderr)
                continue
            outcome = examine(family, *source)
            outcomes[family.name, label] = outcome
            seconds = time.perf_counter() - start
            print(
                f"{family.name:16} {label:22} {outcome.found} error {outcome.error:.1e} {seconds:.1f}s", file=sys.stderr
            )
    summary = summarize(outcomes, not_exported, known)
    print(json.dumps(summary))
    met = summary["found"] == summary["expected"] and not (summary["surplus"] or summary["unequal"])
    return 0 if met and outcomes else 1


if __name__ == "__main__":
    sys.exit(main())
