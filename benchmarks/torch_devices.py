"""Lowered modules on a GPU that is not here: do all tensors live on one device, and does anything wait for it?

    python benchmarks/torch_devices.py --json [--only REGEX]

Every case of ONNX's test suite that the torch backend takes, and the models of benchmarks/gpu.py with few layers in
bfloat16, run with fake tensors on `cuda`: shapes, dtypes and devices are computed as torch does, numbers are not. With
a CUDA build of torch this needs no driver. A CPU build cannot index fake tensors on `cuda`, among others: those cases
are `unknown`, some 14 of 100.

Figures of the last line:

    clean       cases that run, all outputs on `cuda`
    mixed       {case: error} that meet a tensor of another device, or give one
    waits       {what: count} of cases that need numbers: the size of a result depends on data, or sizes are inputs of
                the case; or that copy from the CPU's memory to the device. A CUDA graph cannot be recorded of those
    waiting_models      models of benchmarks/gpu.py among them, which is an error
    unknown     {reason: count} that this build of torch cannot run so

Exit code 0 if nothing is mixed and no model waits.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

warnings.filterwarnings("ignore")

import onnx  # noqa: E402
import torch  # noqa: E402
from conformance import KINDS, case_data, load_cases  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402
from torch_conformance import HAS, to_input, types_of  # noqa: E402

from xform.backends.torch_triton.fuse import fuse  # noqa: E402
from xform.backends.torch_triton.lower import to_torch  # noqa: E402
from xform.capture.onnx_file import capture_onnx  # noqa: E402
from xform.errors import XformError  # noqa: E402

# what a build without CUDA, or a machine without its driver, says when it is asked for the real device
_LACKING = re.compile(r"not linked with support for cuda|without ATen_cuda|no NVIDIA driver|driver version is insuff")
# the result is made of sizes, which are numbers of Python, and moved to the caller's device by the runner
_SIZES = re.compile(r"test_(optional_has_element|sequence_map_extract_shapes)")


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """A tensor, or those of a list, on `cuda` without numbers."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    return tree_map_only(torch.Tensor, one, value)


class Copied(Exception):  # noqa: N818 - a finding
    """Something was copied from the memory of the CPU to the device."""


class Copies(TorchDispatchMode):
    """Raises Copied at the first copy from the CPU to `cuda`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        arrived = isinstance(result, torch.Tensor) and result.device.type == "cuda" and "copy" in str(function)
        if arrived and any(x.device.type == "cpu" for x in given):
            raise Copied(f"{function} from the CPU")
        return result


def examine(module: torch.fx.GraphModule, inputs: list[Any]) -> tuple[str, str]:
    """clean | mixed | waits | unknown, and why. The module's weights are replaced by fake ones."""
    mode = FakeTensorMode()
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(faked(weight.detach(), mode), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = faked(buffer, mode)
    given = faked(inputs, mode)
    try:
        with mode, torch.no_grad(), Copies():
            outputs = module(*given)
    except (DataDependentOutputException, DynamicOutputShapeException, Copied) as error:
        return "waits", str(error)
    except Exception as error:  # what it is, the message tells
        text = " ".join(str(error).split())[:200]
        return ("unknown", _LACKING.search(text)[0]) if _LACKING.search(text) else ("mixed", text)  # type: ignore[index]
    elsewhere = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.device.type != "cuda"]
    return ("mixed", f"{len(elsewhere)} outputs on {elsewhere[0].device}") if elsewhere else ("clean", "")


def suite(only: str) -> Iterator[tuple[str, str, str]]:
    """Name, state and reason of each case of ONNX's suite."""
    for _, case in load_cases(tuple(KINDS)):
        if not re.search(only, case.name):
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model if case.model is not None else onnx.load(f"{case.model_dir}/model.onnx"))
        if types_of(model) - HAS:
            continue
        try:
            module = to_torch(capture_onnx(model))
        except XformError:
            continue  # refused by name: see torch_conformance.py
        inputs, _ = next(iter(case_data(case, model)))
        state, reason = examine(module, [to_input(value) for value in inputs])
        if state == "mixed" and _SIZES.search(case.name) and "outputs on cpu" in reason:
            state = "clean"
        yield case.name, state, reason


def models(only: str) -> Iterator[tuple[str, str, str]]:
    """The same of the models of benchmarks/gpu.py at batch 1."""
    import gpu_models
    from zoo import vision_stub  # noqa: F401  before timm and transformers

    import xform

    for row in gpu_models.ROWS:
        if not row.endswith("/1") or not re.search(only, row):
            continue
        model, inputs = gpu_models.build(row, True)
        made = xform.optimize(
            model, target="cuda", inputs=inputs, precision="bfloat16", verify="off", compile_only=True
        )
        graph = made.artifact.model
        module = to_torch(graph, dtype=torch.bfloat16, cast_outputs=True)
        fuse(module)
        yield row, *examine(module, [inputs[value.name or ""] for value in graph.graph.inputs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="only cases and models that match this regular expression")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    states: collections.Counter[str] = collections.Counter()
    told: dict[str, dict[str, str]] = {"mixed": {}, "waits": {}}
    unknown: collections.Counter[str] = collections.Counter()
    waiting_models = []
    for is_model, found in ((False, suite(arguments.only)), (True, models(arguments.only))):
        for name, state, reason in found:
            states[state] += 1
            if state in told:
                told[state][name] = reason
            if state == "unknown":
                unknown[reason] += 1
            if state == "waits" and is_model:
                waiting_models.append(name)
            if state == "mixed" or is_model:
                print(f"{name}: {state} {reason}", file=sys.stderr)
    figures = {
        "torch": torch.__version__,
        "clean": states["clean"],
        "mixed": told["mixed"],
        "waits": collections.Counter(told["waits"].values()),
        "waiting_models": waiting_models,
        "unknown": dict(unknown),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(figures) if arguments.json else figures)
    return 1 if told["mixed"] or waiting_models or not states["clean"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
