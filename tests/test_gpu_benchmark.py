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

    def lines(row: str, kinds: list[str], small: bool, deadline: float) -> Iterator[dict[str, Any]]:
        asked.append((row, *kinds))
        yield {"begun": row}
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
    assert {kind: "failed" in line for kind, line in results["vit_b/1"].items()} == {
        "eager": False, "xform-off": False, "compile": True, "xform-inductor": False,
    }  # fmt: skip
    assert gpu.figures(results, ["vit_b/1"], SWEEPS)["geomean_vs_best_peer"] == 2.0
    asked.clear()
    gpu.measure(["vit_b/1"], SWEEPS, results, out, time.monotonic() - 1, False)
    assert asked == []  # the time is over


def test_what_failed_earlier_is_tried_again_after_everything_else(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out.jsonl", []
    monkeypatch.setattr(gpu, "worker_lines", worker({"compile"}, asked))
    gpu.measure(["vit_b/1"], SWEEPS, {}, out, time.monotonic() + 60, False)
    asked.clear()
    monkeypatch.setattr(gpu, "worker_lines", worker(set(), asked))
    gpu.measure(["vit_b/1", "deit_s/1"], SWEEPS, gpu.load(out), out, time.monotonic() + 60, False)
    assert asked == [("deit_s/1", *SWEEPS[0]), ("deit_s/1", *SWEEPS[1]), ("vit_b/1", "compile")]
    assert not any("failed" in line or "earlier" in line for row in gpu.load(out).values() for line in row.values())


def test_a_worker_that_dies_before_it_begins_is_not_started_for_each_contender(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def dead(row: str, kinds: list[str], small: bool, deadline: float) -> Iterator[dict[str, Any]]:
        asked.append(row)
        yield {"stopped": "no module named timm"}

    monkeypatch.setattr(gpu, "worker_lines", dead)
    results: Any = {}
    gpu.measure(["vit_b/1"], SWEEPS[:1], results, None, time.monotonic() + 60, False)
    assert asked == ["vit_b/1"]
    assert {line["failed"] for line in results["vit_b/1"].values()} == {"no module named timm"}


def test_a_ratio_is_told_when_all_peers_were_tried(gpu: Any) -> None:
    results = {"vit_b/1": {kind: {"kind": kind, "seconds": 1.0} for kind in ("eager", "xform-off")}}
    found = gpu.figures(results, ["vit_b/1"], SWEEPS)
    assert "ratio" not in found["table"]["vit_b/1"] and found["table"]["vit_b/1"]["ratio_so_far"] == 1.0
    assert found["geomean_vs_best_peer"] is None and found["geomean_rows"] == 0
    results["vit_b/1"]["compile"] = {"kind": "compile", "failed": "CUDA error"}
    found = gpu.figures(results, ["vit_b/1"], SWEEPS)
    assert found["table"]["vit_b/1"]["ratio"] == 1.0 and found["geomean_rows"] == 1


@pytest.mark.parametrize(("program", "stopped"), [("import time; time.sleep(60)", "after 1 s"), ("1 / 0", "Zero")])
def test_a_worker_is_stopped_when_a_contender_takes_too_long(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, stopped: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f'print("{{\\"begun\\": 1}}", flush=True)\n{program}')
    monkeypatch.setattr(gpu, "WORKER", script)
    monkeypatch.setattr(gpu, "PATIENCE", 1.0)
    begun, last = gpu.worker_lines("vit_b/1", ["eager"], False, time.monotonic() + 60)
    assert begun == {"begun": 1} and stopped in last["stopped"]


@pytest.mark.parametrize("is_dead", [False, True])
def test_a_worker_ends_only_where_the_device_is_lost(is_dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_worker

    def wait() -> None:
        if is_dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_worker, "wait", wait)
    assert gpu_worker.is_dead() is is_dead
