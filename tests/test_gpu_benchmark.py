"""benchmarks/gpu.py without a GPU: what it says, and that a run can be stopped and taken up again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SWEEPS = (("eager", "xform-off"), ("compile", "xform-inductor"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    found = run()
    assert found["gpu"] is None and found["geomean_vs_best_peer"] is None
    assert found["table"] == {} and found["kernels"] == {} and found["versions"]["torch"]


@pytest.mark.slow
def test_a_rehearsal_runs_the_kernels_and_a_model() -> None:
    found = run("--rehearse", "--only", "kernels|bert_base/1")
    row = found["table"]["bert_base/1"]
    assert found["missing"] == {} and row["lowered"]["lowered"]["residual_norm"] >= 4
    assert 0 < row["xform-off"]["error"] < 0.1


def worker(crashing: set[str], asked: list[tuple[str, ...]]) -> Any:
    """Measures one contender after the other and dies at the first that crashes."""

    def lines(row: str, kinds: list[str], small: bool, seconds: float) -> Iterator[dict[str, Any]]:
        asked.append((row, *kinds))
        for kind in list(kinds):
            if kind in crashing:
                yield {"stopped": "CUDA error"}
                return
            yield {"kind": kind, "seconds": 2.0 if kind == "eager" else 1.0}

    return lines


def test_a_crash_costs_one_contender(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(gpu, "worker_lines", worker({"eager", "compile"}, asked))
    results: Any = {}
    gpu.measure(["vit_b/1"], SWEEPS, results, tmp_path / "out.jsonl", time.monotonic() + 60, False)
    assert asked == [
        ("vit_b/1", "eager", "xform-off"), ("vit_b/1", "xform-off"),
        ("vit_b/1", "compile", "xform-inductor"), ("vit_b/1", "xform-inductor"),
    ]  # fmt: skip
    found = gpu.figures(results, ["vit_b/1"], SWEEPS)
    assert found["missing"] == {"vit_b/1": ["eager", "compile"]} and found["geomean_vs_best_peer"] is None
    assert found["table"]["vit_b/1"]["eager"]["failed"] == "CUDA error"


def test_a_later_run_measures_what_is_missing(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "out.jsonl", []
    monkeypatch.setattr(gpu, "worker_lines", worker({"compile"}, asked))
    gpu.measure(["vit_b/1"], SWEEPS[:1], {}, out, time.monotonic() + 60, False)
    gpu.measure(["vit_b/1"], SWEEPS, gpu.load(out), out, time.monotonic() + 60, False)
    results = gpu.load(out)
    assert set(results["vit_b/1"]) == {"eager", "xform-off", "xform-inductor"}  # what failed is tried again
    assert gpu.figures(results, ["vit_b/1"], SWEEPS)["geomean_vs_best_peer"] == 2.0
    asked.clear()
    gpu.measure(["vit_b/1"], SWEEPS, results, out, time.monotonic() - 1, False)
    assert asked == []  # the time is over
