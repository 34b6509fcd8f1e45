"""ONNX's own test suite through the torch backend, on the CPU.

    python benchmarks/torch_conformance.py --json

Every node, simple and converted model of `onnx.backend.test.loader` is captured, lowered to torch, and run on the
suite's inputs; outputs are held to the suite's expected ones and tolerances, float16 ones to two units in the last
place at least. Fourier transforms to 1e-6 of their largest number (what cancels to nearly 0 is noise in the expected
outputs too). Outputs that are random by definition are held to their shape and type.

Figures of the last line: `loaded` cases; `excluded_types` have a tensor of a type that torch lacks (strings, 2- and
4-bit numbers) or an input that is no tensor of numbers; of the others `passed`, `wrong` (other numbers, or an error
that is not a refusal) and `unsupported` (refused by name, counted by operator); `share` is passed / (loaded -
excluded).
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from conformance import KINDS, case_data, difference, load_cases  # noqa: E402

from xform.backends.torch_triton.lower import to_torch  # noqa: E402
from xform.backends.torch_triton.lower.dtypes import TORCH_DTYPES  # noqa: E402
from xform.backends.torch_triton.lower.parameters import array_of, torch_of  # noqa: E402
from xform.capture.onnx_file import capture_onnx  # noqa: E402
from xform.errors import XformError  # noqa: E402

HAS = {int(dtype) for dtype in TORCH_DTYPES} | {onnx.TensorProto.UNDEFINED}
_RANDOM = re.compile(r"bernoulli|random_(normal|uniform)|multinomial|training_dropout|dropout.*ratio")
_NAMED = re.compile(r"node\(s\)(?: of)?: (.*)")


@dataclass
class Result:
    """What became of one case: excluded | passed | wrong | unsupported, and why."""

    name: str
    state: str
    detail: str = ""


def types_of(model: onnx.ModelProto) -> set[int]:
    """Element types of every tensor that the model declares, converts to, or holds."""
    found: set[int] = set()

    def visit(graph: Any) -> None:
        for info in (*graph.input, *graph.output, *graph.value_info):
            collect(info.type)
        found.update(tensor.data_type for tensor in graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype", "output_dtype"):
                    found.add(attribute.i)
                if attribute.HasField("t"):
                    found.add(attribute.t.data_type)
                if attribute.HasField("g"):
                    visit(attribute.g)

    def collect(kind: onnx.TypeProto) -> None:
        which = kind.WhichOneof("value")
        if which in ("tensor_type", "sparse_tensor_type"):
            found.add(getattr(kind, which).elem_type)
        elif which in ("sequence_type", "optional_type"):
            collect(getattr(kind, which).elem_type)
        elif which is not None:
            found.add(-1)

    visit(model.graph)
    return found


def to_input(value: Any) -> Any:
    """A value of the suite as the module takes it."""
    if isinstance(value, (list, tuple)):
        return [to_input(item) for item in value]
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return None if value is None else torch_of(np.asarray(value))


def to_output(value: Any) -> Any:
    """A value of the module as the suite has it."""
    if isinstance(value, (list, tuple)):
        return [to_output(item) for item in value]
    return array_of(value) if isinstance(value, torch.Tensor) else value


def examine(case: Any) -> Result:
    """Run one case."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model if case.model is not None else onnx.load(f"{case.model_dir}/model.onnx"))
    lacking = types_of(model) - HAS
    if lacking:
        return Result(case.name, "excluded", ", ".join(sorted(_type_name(kind) for kind in lacking)))
    try:
        module = to_torch(capture_onnx(model))
    except XformError as error:
        return Result(case.name, "unsupported", error.what)
    except Exception as error:  # an error that nobody wrote on purpose is a finding
        return Result(case.name, "wrong", f"lowering: {type(error).__name__}: {str(error)[:150]}")
    for inputs, expected in case_data(case, model):
        try:
            with torch.no_grad():
                got = [to_output(value) for value in module(*map(to_input, inputs))]
        except Exception as error:
            return Result(case.name, "wrong", f"running: {type(error).__name__}: {str(error)[:150]}")
        if _RANDOM.search(case.name):
            expected = [np.zeros_like(value) for value in expected]
            got = [np.zeros_like(value) for value in got]
        expected = [onnx.numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in expected]
        halves = any(isinstance(v, np.ndarray) and v.dtype == np.float16 for v in expected)
        atol = case.atol
        if "dft" in case.name:
            atol = 1e-6 * max(float(np.abs(v).max()) for v in expected)
        found = difference(expected, got, max(case.rtol, 2**-9) if halves else case.rtol, atol)
        if found:
            return Result(case.name, "wrong", found)
    return Result(case.name, "passed")


def _type_name(kind: int) -> str:
    return "map" if kind < 0 else onnx.TensorProto.DataType.Name(kind).lower()


def summary(results: list[Result], seconds: float) -> dict[str, Any]:
    """The figures of the last line."""
    states = collections.Counter(result.state for result in results)
    unsupported: collections.Counter[str] = collections.Counter()
    for result in results:
        if result.state == "unsupported":
            found = _NAMED.search(result.detail)
            unsupported[re.sub(r" \(.*", "", found[1]) if found else "capture"] += 1
    rest = len(results) - states["excluded"]
    return {
        "loaded": len(results),
        "excluded_types": states["excluded"],
        "passed": states["passed"],
        "share": round(states["passed"] / max(rest, 1), 4),
        "wrong": states["wrong"],
        "unsupported": dict(unsupported.most_common()),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--verbose", action="store_true", help="tell of refused cases too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    results = []
    cases = [case for _, case in load_cases(tuple(arguments.kinds)) if re.search(arguments.only, case.name)]
    for index, case in enumerate(cases):
        results.append(examine(case))
        if index % 100 == 0:
            print(f"{index} of {len(cases)}", file=sys.stderr, flush=True)
        if results[-1].state == "wrong" or (arguments.verbose and results[-1].state == "unsupported"):
            print(f"{results[-1].state}  {case.name}: {results[-1].detail}", file=sys.stderr, flush=True)
    figures = summary(results, time.monotonic() - start)
    print(json.dumps(figures) if arguments.json else figures)
    return 0 if figures["wrong"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
