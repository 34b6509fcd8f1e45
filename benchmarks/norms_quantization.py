"""What benchmarks/norms.py shows of scale reparameterization: equal codes, and a lower error with planted outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xform.graph.values import display_name, rank_of
from xform.passes.normalize import LayerWiseScales, MigrateScales
from xform.passes.normalize.layer_wise_scales import SCALE, ZERO_POINT, Quantization, channel_wise
from xform.passes.normalize.readers import linear_readers
from xform.patterns import norm as norms
from xform.pipeline.calibration import norm_ranges, observe
from xform.pipeline.manager import run_pipeline

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[ir.Model, Mapping[str, Any]], list[Array]]
BITS = 8


def norms_by_name(model: ir.Model) -> dict[str, norms.Norm]:
    """The norms of the main graph by the name that users know."""
    found = [norms.read(node) for node in model.graph]
    return {display_name(norm.node): norm for norm in found if not isinstance(norm, str)}


def results(model: ir.Model, batches: list[Feeds], run: Run | None) -> dict[str, Array]:
    """What every norm gives on all batches, by name: [rows, C]."""
    by_name = norms_by_name(model)
    arrays = list(observe(model, batches, [norm.output for norm in by_name.values()], run))
    rows = [[np.asarray(a).reshape(-1, np.shape(a)[-1]) for a in batch] for batch in arrays]
    return {name: np.concatenate([batch[i] for batch in rows]) for i, name in enumerate(by_name)}


def repquant(model: ir.Model, batches: list[Feeds], run: Run | None) -> dict[str, Any]:
    """Codes with one scale per channel before, and one per layer after, on the calibration batch.

    Args:
        model: A canonical graph.
        batches: The calibration batches.
        run: How to run it; None for ONNX Runtime.
    """
    ranges = norm_ranges(model, batches, run)
    result = run_pipeline(model, [LayerWiseScales(ranges, BITS)], verify="off", strict=True)
    before, after = results(model, batches, run), results(result.model, batches, run)
    new_norms = norms_by_name(result.model)
    equal = total = changed = 0
    for name, old in norms_by_name(model).items():
        metadata = new_norms[name].node.metadata_props
        if ZERO_POINT not in metadata:
            continue
        channels = channel_wise(ranges[old.output.name or ""], BITS)
        assert channels is not None
        layer = Quantization(np.asarray(float(metadata[SCALE])), np.asarray(int(metadata[ZERO_POINT])), BITS)
        same = channels.codes(before[name]) == layer.codes(after[name])
        equal, total, changed = equal + int(same.sum()), total + same.size, changed + 1
    want, got = _outputs(model, batches[0], run), _outputs(result.model, batches[0], run)
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))
    return {"norms": changed, "codes": total, "equal": equal, "share_equal": equal / max(total, 1), "rel_err": error}


def _outputs(model: ir.Model, feeds: Feeds, run: Run | None) -> list[Array]:
    return [batch[0] for batch in observe(model, [feeds], list(model.graph.outputs)[:1], run)]


def plant_outliers(model: ir.Model, factor: float = 40.0, seed: int = 0) -> ir.Model:
    """A copy with two channels of every norm `factor` times as large."""
    planted = model.clone()
    rng = np.random.default_rng(seed)
    for norm in norms_by_name(planted).values():
        scale = norm.scale.copy()
        scale[rng.choice(norm.channels, 2, replace=False)] *= factor
        value = norm.node.inputs[1]
        assert value is not None and value.dtype is not None and value.const_value is not None
        name = value.const_value.name
        value.const_value = ir.tensor(scale.astype(value.dtype.numpy()), dtype=value.dtype, name=name)
    return planted


def smoothquant(model: ir.Model, batches: list[Feeds], run: Run | None, alpha: float = 0.5) -> dict[str, Any]:
    """Migration with planted outliers: equality in float, and the W8A8 error of the layers behind the norms."""
    planted = plant_outliers(model)
    ranges = norm_ranges(planted, batches, run)
    result = run_pipeline(planted, [MigrateScales(ranges, alpha)], verify="off", strict=True)
    want, got = _outputs(planted, batches[0], run), _outputs(result.model, batches[0], run)
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))
    before = w8a8_error(planted, results(planted, batches, run))
    after = w8a8_error(result.model, results(result.model, batches, run))
    return {"alpha": alpha, "rel_err": error, "w8a8_error_before": before, "w8a8_error_after": after}


def w8a8_error(model: ir.Model, observed: Mapping[str, Array]) -> float:
    """Mean over layers of |Q(X) Q(W) - X W| / |X W| (Frobenius), X per tensor, W per output channel, both symmetric."""
    errors = []
    for name, norm in norms_by_name(model).items():
        readers = linear_readers(norm.output, (rank_of(norm.output) or 1) - 1, norm.channels)
        for reader in readers if isinstance(readers, list) else []:
            weight = reader.linear.weight
            if reader.linear.node.op_type != "MatMul":
                continue
            x = np.asarray(observed[name], np.float64)
            exact = x @ weight
            rounded = _quantized(x, np.abs(x).max()) @ _quantized(weight, np.abs(weight).max(axis=0, keepdims=True))
            errors.append(float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)))
    return float(np.mean(errors))


def _quantized(array: Array, peak: Any) -> Array:
    step = peak / 127
    quantized: Array = np.clip(np.round(array / step), -127, 127) * step
    return quantized
