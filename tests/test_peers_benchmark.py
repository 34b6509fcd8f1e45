"""benchmarks/peers.py and roofline.py: what they make of made-up measurements."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import parse

import xform

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def measured(**rounds: list[float]) -> dict[str, Any]:
    named = {name.replace("_", "-"): ms for name, ms in rounds.items()}
    medians = {name: sorted(ms)[len(ms) // 2] for name, ms in named.items()}
    return {"ms": medians, "rounds": named, "failed": {}, "errors": {}, "notes": {"xform": {"attention": 6}}}


def test_ratios_are_taken_within_a_round_against_the_best_peer() -> None:
    peers = importlib.import_module("peers")
    result = measured(xform=[1.0, 2.0, 4.0], ort=[1.5, 3.0, 6.0], openvino=[9.0, 9.0, 9.0])  # the machine slows down
    assert peers.ratios(result, "xform", peers.FP32_PEERS) == (1.5, "ort")
    assert peers.ratios(result, "xform-int8", peers.FP32_PEERS) is None


def test_the_summary_has_the_least_and_the_mean() -> None:
    peers = importlib.import_module("peers")
    results = {
        "a x1": measured(xform=[1.0], ort=[2.0], xform_int8=[0.5], ort_int8=[1.0]),
        "b x1": measured(xform=[2.0], ort=[1.0], xform_int8=[0.5], ort_int8=[2.0]),
    }
    found = peers.summary(results, {"a x1": 6, "b x1": 0})
    assert found["fp32"]["geomean_vs_best_peer"] == 1.0 and found["fp32"]["min_vs_best_peer"] == 0.5
    assert found["int8"]["geomean_vs_best_fp32_peer"] == round(math.sqrt(4 * 2), 4)
    assert found["int8"]["geomean_vs_best_int8_peer"] == round(math.sqrt(2 * 4), 4)
    assert found["attention"] == {"a x1": {"layers": 6, "fused": 6}}


def test_rows_of_pads_do_not_count_as_errors(tmp_path: Path) -> None:
    peers = importlib.import_module("peers")
    expected = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    found = expected * mask[..., None]
    np.savez(tmp_path / "reference.npz", expected)
    np.savez(tmp_path / "output.npz", found)
    np.savez(tmp_path / "feeds.npz", attention_mask=mask)
    assert peers._error(tmp_path) == 0.0
    found[0, 1, 2] += 0.5
    np.savez(tmp_path / "output.npz", found)
    assert peers._error(tmp_path) == pytest.approx(0.5 / np.abs(expected[mask != 0]).max(), rel=1e-5)


def test_the_padded_form_is_told_beside_the_packed_one() -> None:
    peers = importlib.import_module("peers")
    found = peers.summary({"a x16": measured(xform=[1.0], xform_padded=[2.5], ort=[2.0])}, {"a x16": 6})
    assert found["fp32"]["ratios"] == {"a x16": [2.0, "ort"]}
    assert found["fp32"]["ratios_padded"] == {"a x16": [0.8, "ort"]}


def test_the_profile_has_every_kernel_once(tmp_path: Path) -> None:
    roofline = importlib.import_module("roofline")
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    text = "g (float[4,8] x, float[8,8] w) => (float[4,8] y) { a = MatMul(x, w) b = Tanh(a) y = MatMul(b, w) }"
    path = xform.optimize(parse(text, {"w": weight}), tune="off").save(tmp_path / "m.onnx")[0]
    times = roofline.profile(path, {"x": np.ones((4, 8), np.float32)}, 0.0)
    assert set(times) == {"MatMul", "Tanh"} and all(ms > 0 for ms in times.values())
