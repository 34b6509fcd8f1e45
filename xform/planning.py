"""What `optimize` runs for a request: passes with calibration and searches done, and what they are verified with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from xform.backends import LoadOptions, LowerOptions, Runner
from xform.errors import TargetError, VerificationError
from xform.passes.attention import PackTokens
from xform.passes.integer import Quantizer
from xform.passes.precision import ConvertPrecision
from xform.pipeline.calibration_data import Flatten, calibration_batches, first_rows
from xform.pipeline.half_range import within_range
from xform.pipeline.manager import run_pipeline
from xform.pipeline.oracle import CouldNotRunError, Inputs, Oracle, Outputs
from xform.pipeline.padding import zero_pads
from xform.pipeline.quantization import Quantization
from xform.pipeline.reference import Execute, run_anywhere
from xform.pipeline.result import PipelineResult
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.verdict import Verification
from xform.pipeline.verify import UserInputs, Verifier
from xform.rewrite.passes import Pass
from xform.rewrite.remarks import Remark
from xform.target import Target

if TYPE_CHECKING:
    from xform.compilation import Request

_COMPARED = 2  # calibration batches that the result is compared on where the user gave no inputs


@dataclass(frozen=True)
class Plan:
    """What `optimize` runs for a request, and `explain` and `bisect` too.

    Attributes:
        captured: The graph whose meaning is kept.
        passes: In order, with calibration and searches done.
        verifier: Holds reference numbers of `captured`.
        quantization: What quantizes, if some pass does.
        remarks: What was decided on the way.
        warning: About the data that was calibrated on; empty if there is none.
        inputs: What `verifier` compares on: of the user, or where there are none, some calibration data.
    """

    captured: ir.Model
    request: Request
    passes: tuple[Pass, ...]
    verifier: Verifier
    quantization: Quantization | None = None
    remarks: tuple[Remark, ...] = ()
    warning: str = ""
    inputs: UserInputs | None = None

    @staticmethod
    def of(
        captured: ir.Model,
        request: Request,
        *,
        inputs: UserInputs | None = None,
        oracle: Oracle | None = None,
        flatten: Flatten | None = None,
    ) -> Plan:
        """Calibrate and search where a pass needs it, on graphs that were verified. See `compile_graph`."""
        if request.padding == "packed":  # from here on zeros in pads are what the model means
            plain = tuple(one for one in request.passes if not isinstance(one, PackTokens | Quantizer))
            unpacked = Plan(captured, request, plain, _verifier(captured, request, inputs, oracle))
            captured, oracle = zero_pads(captured, unpacked.exactly(plain)), None
        plan = Plan(captured, request, request.passes, _verifier(captured, request, inputs, oracle), inputs=inputs)
        return plan._quantized(flatten)._within_range()

    def _quantized(self, flatten: Flatten | None) -> Plan:
        """With calibration and the search for what is quantized done, where some pass quantizes.

        Ranges hold for data like those that were calibrated on. So these are what the result is compared on where the
        user gave calibration data and no inputs; the exact passes before are compared on random inputs all the same.
        """
        captured, request = self.captured, self.request
        if not any(isinstance(one, Quantizer) for one in request.passes):
            return self
        batches, warning = calibration_batches(captured, request.calibration, flatten)
        quantization = Quantization(request.passes, self.exactly, batches, request.progress)
        form = quantization.form_for(request.backend.name)
        found = replace(self, passes=form.passes, quantization=quantization, remarks=form.remarks, warning=warning)
        if self.inputs is not None or request.calibration is None:
            return found
        inputs = [first_rows(captured, batch) for batch in batches[:_COMPARED]]
        return replace(found, verifier=_verifier(captured, request, inputs, self.verifier.oracle), inputs=inputs)

    def _within_range(self) -> Plan:
        """With what leaves the range of float16 kept out of it, where some pass makes float16."""
        place = next((i for i, one in enumerate(self.passes) if isinstance(one, ConvertPrecision)), None)
        if place is None:
            return self
        before, asked, after = self.passes[:place], self.passes[place], self.passes[place + 1 :]
        assert isinstance(asked, ConvertPrecision)
        self.verifier.prepare()
        cases = [case.arrays for case in self.verifier.cases_for(asked.fidelity)]
        model = run_pipeline(self.captured, before, target=self.request.target, verify="off").model
        chosen, remarks = within_range(asked, model, cases)
        return replace(self, passes=(*before, chosen, *after), remarks=(*self.remarks, *remarks))

    @property
    def tolerance(self) -> UserTolerance | None:
        """What the result is held to."""
        return self.request.tolerance

    def run(self, passes: Sequence[Pass], verifier: Verifier | None = None) -> PipelineResult:
        """Run some passes on the captured graph, verified as the request says."""
        request = self.request
        return run_pipeline(
            self.captured,
            passes,
            target=request.target,
            verify=request.verify,
            strict=request.strict,
            progress=request.progress,
            verifier=verifier or self.verifier,
        )

    def exactly(self, passes: Sequence[Pass]) -> ir.Model:
        """What exact passes make of the captured graph, verified under the tolerances of exact passes."""
        result = self.run(passes, self.verifier.under(self.request.exact_tolerance))
        refuse_failed(result.verification, "the optimized graph differs from the original before it is quantized")
        return result.model


def _verifier(captured: ir.Model, request: Request, inputs: UserInputs | None, oracle: Oracle | None) -> Verifier:
    execute = _executor(captured, request)
    return Verifier(captured, oracle, inputs, tolerance=request.tolerance, execute=execute)


def run_cases(runner: Runner, graph: ir.Model, cases: Sequence[Inputs]) -> list[Outputs]:
    """Outputs of a loaded artifact of `graph`, as the verifier compares them."""
    dtypes = {value.name: value.dtype for value in graph.graph.inputs}
    results = []
    for case in cases:
        feeds = {name: _as_declared(array, dtypes.get(name)) for name, array in case.items()}
        outputs = [_as_compared(output) for output in runner.run(feeds)]
        results.append(dict(zip(runner.output_names, outputs, strict=True)))
    return results


def _executor(captured: ir.Model, request: Request) -> Execute:
    """What runs graphs between passes: ONNX Runtime, or torch if there are operators that only torch has."""
    if request.backend.name != "torch_triton" or all(node.domain != "torch" for node in captured.graph.all_nodes()):
        return run_anywhere

    def execute(graph: ir.Model, cases: Sequence[Inputs]) -> list[Outputs]:
        here = Target("cpu")
        try:
            runner = request.backend.load(request.backend.lower(graph, here, LowerOptions()), LoadOptions())
            try:
                return run_cases(runner, graph, cases)
            finally:
                runner.close()
        except TargetError as error:
            raise CouldNotRunError(error.what, where=error.where) from error

    return execute


def _as_declared(array: Any, dtype: ir.DataType | None) -> Any:
    """The verifier holds values of dtypes that NumPy lacks as float32."""
    if dtype is None or not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        return array
    return array.astype(dtype.numpy()) if dtype.numpy().isbuiltin != 1 else array


def _as_compared(output: Any) -> Any:
    is_extension = isinstance(output, np.ndarray) and output.dtype.isbuiltin != 1 and output.dtype.kind == "V"
    return output.astype(np.float32) if is_extension else output


def refuse_failed(verification: Verification, what: str) -> None:
    if verification.state == "failed" and not verification.outputs:
        raise TargetError(
            f"the graph does not run: {verification.reason}",
            hint="give verify='off' to write the graph all the same",
        )
    if verification.state == "failed":
        raise VerificationError(
            f"{what}: {verification.reason}",
            hint="run `xform bisect` to find the pass and the node, or widen `tolerance` if the error is acceptable",
        )
