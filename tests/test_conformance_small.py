"""A seeded sample of ONNX's own test suite through the default path; `benchmarks/conformance.py` runs all of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SAMPLE = 150


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "conformance.py"
    spec = importlib.util.spec_from_file_location("conformance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conformance"] = module
    spec.loader.exec_module(module)
    return module


def test_no_case_of_the_sample_is_harmed(conformance: ModuleType) -> None:
    command = [sys.executable, "-W", "ignore", conformance.__file__, "--json", "--jobs", "2", "--sample", str(SAMPLE)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout.splitlines()[-1])
    assert figures["loaded"] == SAMPLE and figures["harmed"] == 0
    assert figures["met_before"] > SAMPLE // 2


def test_harm_is_counted(conformance: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that negates the graph's output, one that raises and one that crashes are all found."""
    cases = [case for case in conformance.load_cases(("node",)) if case[1].name in ("test_abs", "test_exp")]

    def negated(model: object) -> bytes:
        proto = conformance.onnx.ModelProto()
        proto.CopyFrom(model)
        proto.graph.node[-1].output[0] = "before"
        proto.graph.node.append(conformance.onnx.helper.make_node("Neg", ["before"], [proto.graph.output[0].name]))
        return proto.SerializeToString()

    def crashed(_model: object) -> bytes:
        import os

        os._exit(3)

    def raised(_model: object) -> bytes:
        raise ValueError("planted")

    for broken, after in ((negated, "not_met"), (raised, "raised"), (crashed, "crashed")):
        monkeypatch.setitem(conformance.THROUGH, "broken", broken)
        results = conformance.run(cases, "broken", jobs=1)
        assert {(r.before, r.after) for r in results} == {("met", after)}
        assert conformance.summary(results, 0.0)["harmed"] == len(cases)
