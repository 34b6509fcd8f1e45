"""Make what one contender of benchmarks/peers.py runs: `python peers_prepare.py CONTENDER MODEL BATCH FOLDER`.

A process of its own for every contender, as some of them change global state or crash. The last line of stdout is JSON:
the worker's request (see peers_worker.py), with notes; or {"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# float32 where the model says float32: OpenVINO's default is bfloat16 where the machine has it
OPENVINO = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
CALIBRATION = 16  # samples for contenders that calibrate

Request = dict[str, Any]


def ort(name: str, batch: int, source: Path, folder: Path) -> Request:
    """The export as it is."""
    return {"kind": "onnxruntime", "model": str(source)}


def ort_transformers(name: str, batch: int, source: Path, folder: Path) -> Request:
    """ONNX Runtime's transformer optimizer, with the model type that its user would name."""
    from onnxruntime.transformers import optimizer
    from peers_models import MODELS

    kind = MODELS[name].model_type
    if kind is None:
        raise NotImplementedError("the transformer optimizer has nothing for this model")
    optimized = optimizer.optimize_model(str(source), model_type=kind, use_gpu=False)
    target = folder / "ort-transformers.onnx"
    optimized.save_model_to_file(str(target))
    return {"kind": "onnxruntime", "model": str(target), "fused": optimized.get_fused_operator_statistics()}


def onnxscript(name: str, batch: int, source: Path, folder: Path) -> Request:
    """onnxscript's fusions for ONNX Runtime."""
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, counts = optimize_for_ort(ir.load(source))
    target = folder / "onnxscript.onnx"
    ir.save(model, target)
    return {"kind": "onnxruntime", "model": str(target), "fused": {k: v for k, v in counts.items() if v}}


def onnxslim(name: str, batch: int, source: Path, folder: Path) -> Request:
    """onnxslim, then ONNX Runtime."""
    import onnx
    import onnxslim as slim

    target = folder / "onnxslim.onnx"
    onnx.save(slim.slim(onnx.load(source)), target)
    return {"kind": "onnxruntime", "model": str(target)}


def inductor(name: str, batch: int, source: Path, folder: Path) -> Request:
    """torch.compile with freezing; compiled when the worker opens it."""
    return {"kind": "inductor", "model": name}


def openvino(name: str, batch: int, source: Path, folder: Path) -> Request:
    """OpenVINO on the export."""
    return {"kind": "openvino", "model": str(source), "settings": OPENVINO}


def openvino_int8(name: str, batch: int, source: Path, folder: Path) -> Request:
    """NNCF's post-training quantization with its default preset, calibrated on 16 inputs."""
    import nncf
    import openvino as ov
    from peers_models import MODELS, example

    model = ov.Core().read_model(source)
    samples = nncf.Dataset(
        [for_export(example(MODELS[name], batch, seed), source) for seed in range(1, CALIBRATION + 1)]
    )
    kind = nncf.ModelType.TRANSFORMER if MODELS[name].transformer else None
    quantized = nncf.quantize(model, samples, subset_size=CALIBRATION, model_type=kind)
    target = folder / "openvino-int8.xml"
    ov.save_model(quantized, target, compress_to_fp16=False)
    return {"kind": "openvino", "model": str(target), "settings": OPENVINO}


def ort_int8(name: str, batch: int, source: Path, folder: Path) -> Request:
    """ONNX Runtime's dynamic quantization, weights per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # the dynamo exporter's shapes contradict ONNX's own inference, which it runs
    stripped, target = folder / "stripped.onnx", folder / "ort-int8.onnx"
    onnx.save(model, stripped)
    quantize_dynamic(str(stripped), str(target), per_channel=True, weight_type=QuantType.QInt8)
    return {"kind": "onnxruntime", "model": str(target)}


def xform_exact(name: str, batch: int, source: Path, folder: Path) -> Request:
    """xform's exact preset with the measured choice among its lowerings."""
    return _xform("exact", name, batch, source, folder)


def xform_padded(name: str, batch: int, source: Path, folder: Path) -> Request:
    """The same with the padding that the model computes on, where xform would leave it out."""
    return _xform("exact", name, batch, source, folder, padding="padded")


def xform_int8(name: str, batch: int, source: Path, folder: Path) -> Request:
    """xform's int8 preset, calibrated on the same 16 inputs as NNCF."""
    return _xform("int8", name, batch, source, folder)


def _xform(preset: str, name: str, batch: int, source: Path, folder: Path, padding: str | None = None) -> Request:
    from peers_models import MODELS, example

    import xform

    calibration = None
    if preset == "int8":
        seeds: Iterator[int] = iter(range(1, CALIBRATION + 1))
        calibration = [for_export(example(MODELS[name], batch, seed), source) for seed in seeds]
    feeds = for_export(example(MODELS[name], batch), source)
    chosen = padding or MODELS[name].padding
    result = xform.optimize(
        source, "cpu", preset=preset, inputs=feeds, calibration=calibration, tune="full", padding=chosen
    )
    suffix = ".xml" if result.report.backend == "openvino" else ".onnx"
    target = result.save(folder / f"xform-{preset}-{chosen}{suffix}")[0]
    return {
        "kind": result.report.backend,
        "model": str(target),
        "settings": result.artifact.metadata.get("session", {}),
        "attention": result.report.concepts.get("attention", 0),
        "tuning": result.report.artifact.get("tuning", {}),
    }


def for_export(feeds: dict[str, Any], source: Path) -> dict[str, Any]:
    """Feeds without the arguments that the exported graph does not read."""
    import onnx

    wanted = {value.name for value in onnx.load(source, load_external_data=False).graph.input}
    return {name: np.asarray(array) for name, array in feeds.items() if name in wanted}


CONTENDERS: dict[str, Callable[[str, int, Path, Path], Request]] = {
    "xform": xform_exact,
    "xform-padded": xform_padded,
    "xform-int8": xform_int8,
    "ort": ort,
    "ort-transformers": ort_transformers,
    "onnxscript": onnxscript,
    "onnxslim": onnxslim,
    "inductor": inductor,
    "openvino": openvino,
    "ort-int8": ort_int8,
    "openvino-int8": openvino_int8,
}


def main() -> None:
    """Prepare one contender."""
    contender, name, batch, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    answer: dict[str, Any]
    try:
        if contender == "export":
            import torch
            from peers_models import MODELS, as_tensors, built, example, export

            module, feeds = built(MODELS[name]), example(MODELS[name], batch)
            with torch.no_grad():
                np.savez(folder / "reference.npz", module(**as_tensors(feeds)).numpy())
            np.savez(folder / "feeds.npz", **feeds)
            export(module, feeds, folder / "partial.onnx").rename(folder / "export.onnx")
            answer = {"model": str(folder / "export.onnx")}
        else:
            answer = CONTENDERS[contender](name, batch, folder / "export.onnx", folder)
    except Exception as error:  # told to the parent, which puts it into the table
        answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
