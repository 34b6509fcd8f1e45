"""benchmarks/kernels_compiled.py: kernels become machine code for GPUs that are not here, and what is judged of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels_compiled.py"
CASES = {
    "residual_norm": "layer 768",
    "gated_unit": "silu 8192",
    "bias_activation": "gelu 3072",
    "rotary_qk": "32 and 8 heads of 64",
}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kernels_compiled

    return kernels_compiled


def run(*arguments: str, interpret: str) -> Any:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--json", "--arch", "90", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_compiles_and_has_wide_accesses_without_spilling() -> None:
    only = "|".join(f"{kernel}, {case}, bfloat16" for kernel, case in CASES.items())
    done = run("--only", only, interpret="0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == {} and found["poor"] == [] and found["compiled"] >= 5 * len(CASES)
    assert {kernel: list(cases) for kernel, cases in found["best"].items()} == {k: [c] for k, c in CASES.items()}
    for kernel, case in CASES.items():
        line = found["best"][kernel][case]
        assert line["load_bytes"] == line["store_bytes"] == 16 and line["resident_warps"] >= 32


def test_in_the_interpreter_it_refuses() -> None:
    done = run(interpret="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_accesses_are_read_from_the_code(judge: Any) -> None:
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
        ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
        ld.shared.b32 %r5, [%r6];
        st.global.b64 [ %rd3 + 0 ], { %rd4 };"""
    assert judge.widths(ptx, "ld") == [16, 8, 2] and judge.widths(ptx, "st") == [8]


def test_what_fails_or_is_narrow_is_told(judge: Any) -> None:
    def line(case: str, width: int, spilled: int, **more: Any) -> dict[str, Any]:
        named = {"kernel": "k", "case": case, "dtype": "bfloat16", "arch": 90, "configuration": {"warps": width}}
        measured = {"load_bytes": width, "store_bytes": 16, "spilled_bytes": spilled, "resident_warps": 1}
        return {**named, **(more or measured)}

    found = judge.figures([
        line("good", 16, 0), line("good", 8, 0), line("narrow", 8, 0), line("spills", 16, 8), line("spills", 4, 0),
        line("odd", 2, 0), line("good", 1, 0, failed="PTXASError"),
    ])  # fmt: skip
    assert found["poor"] == ["k, narrow, bfloat16, sm_90", "k, spills, bfloat16, sm_90"]
    assert list(found["failed"].values()) == ["PTXASError"] and len(found["spilled"]) == 1 and found["compiled"] == 6
    assert found["best"]["k"]["good"]["load_bytes"] == 16 and found["best"]["k"]["spills"]["load_bytes"] == 4
