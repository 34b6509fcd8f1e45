"""What a candidate is compared with, and what can run a graph at all.

The reference is, in this order: a callable (the torch module); the file as it came, run by ONNX Runtime without its
optimizations, so that capture is verified too; the captured model, where the file itself does not run. ONNX Runtime
has no kernel for some operators in some dtypes (Erf in float64, most of bfloat16). Graphs that fail for that reason,
and for no other, are run by PyTorch, and where that knows an operator neither, by ONNX's reference evaluator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from xform.pipeline.oracle import (
    CouldNotRunError,
    Inputs,
    Oracle,
    Outputs,
    Session,
    call_oracle,
    to_numpy,
)  # fmt: skip

Execute = Callable[[ir.Model, Sequence[Inputs]], list[Outputs]]

_NO_KERNEL = ("Could not find an implementation", "NOT_IMPLEMENTED")


class OriginalModel:
    """A model as it came, before capture touched it.

    Args:
        source: A path, serialized bytes, a ModelProto, or an onnx_ir model.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model) -> None:
        self._source = source
        self._session: Session | None = None

    def open(self) -> None:
        """Load it.

        Raises:
            CouldNotRunError: ONNX Runtime does not load it.
        """
        if self._session is not None:
            return
        if isinstance(self._source, ir.Model):
            self._session = Session(self._source)
            return
        folder = path = None
        if isinstance(self._source, str | os.PathLike):
            path = Path(self._source).absolute()
            folder = path.parent
            proto = onnx.load(path, load_external_data=False)
        elif isinstance(self._source, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(self._source)
        else:
            proto = onnx.ModelProto.FromString(self._source)
        self._session = Session(proto, folder=folder, path=path)

    def __call__(self, inputs: Inputs) -> Mapping[str, Any]:
        """Outputs by name."""
        self.open()
        assert self._session is not None
        return self._session.run(inputs)

    def close(self) -> None:
        """Release it; the next call loads it again."""
        if self._session is not None:
            self._session.close()
            self._session = None


class Reference:
    """Runs the reference. Use as a context manager, so that its memory is released.

    Args:
        model: The captured model.
        oracle: What is the reference instead, where it runs.

    Attributes:
        name: What the reference is, in words.
        is_captured: Whether it is the captured model itself.

    Raises:
        CouldNotRunError: Nothing here runs it.
    """

    def __init__(self, model: ir.Model, oracle: Oracle | None) -> None:
        self.is_captured = False
        self._oracle: Oracle
        self._raises_its_own = True
        self._close: Callable[[], None] = lambda: None
        self._outputs = [value.name or "" for value in model.graph.outputs]
        why = ""
        if isinstance(oracle, OriginalModel):
            try:
                oracle.open()
            except CouldNotRunError as error:
                why = f" (the file as it came does not run: {error.what})"
            else:
                self.name, self._oracle, self._close = "the file as it came, run by ONNX Runtime", oracle, oracle.close
                return
        elif oracle is not None:
            self.name, self._oracle = getattr(oracle, "name", "the function given"), oracle
            self._raises_its_own = False
            return
        self.is_captured = True
        runner, by = _runner(model)
        self.name, self._close = f"the captured model, run by {by}{why}", runner.close
        self._oracle = runner.run

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs by the captured model's names.

        Raises:
            CouldNotRunError: It does not take these inputs.
        """
        if not self._raises_its_own:
            return call_oracle(self._oracle, inputs, self._outputs)
        found = self._oracle(inputs)
        assert isinstance(found, Mapping)
        values = found.values() if len(found) == len(self._outputs) else [found[name] for name in self._outputs]
        return dict(zip(self._outputs, values, strict=True))

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def run_anywhere(model: ir.Model, cases: Sequence[Inputs]) -> list[Outputs]:
    """Outputs of a graph for each of `cases`, by the first of ONNX Runtime, PyTorch and ONNX's evaluator that can.

    Raises:
        CouldNotRunError: ONNX Runtime fails for another reason than a missing kernel, or nothing runs it.
    """
    runner, _ = _runner(model)
    try:
        return [runner.run(case) for case in cases]
    finally:
        runner.close()


class _Runner:
    """Something that runs a graph and can be released."""

    def __init__(self, run: Callable[[Inputs], Outputs], close: Callable[[], None]) -> None:
        self.run = run
        self.close = close


def _runner(model: ir.Model) -> tuple[_Runner, str]:
    try:
        session = Session(model)
        return _Runner(session.run, session.close), "ONNX Runtime"
    except CouldNotRunError as error:
        if not any(text in error.what for text in _NO_KERNEL):
            raise
        first = error
    try:
        return _by_torch(model), "PyTorch, as ONNX Runtime has no kernel for it"
    except Exception as error:  # whatever a lowering that was not made for this graph raises: the next one is asked
        second = error
    try:
        return _by_evaluator(model), "ONNX's reference evaluator, as ONNX Runtime has no kernel for it"
    except Exception as error:
        raise CouldNotRunError(
            f"{first.what}; PyTorch: {_brief(second)}; ONNX's reference evaluator: {_brief(error)}"
        ) from error


def _by_torch(model: ir.Model) -> _Runner:
    from xform.backends import LoadOptions, LowerOptions, get_backend
    from xform.target import Target

    target = Target.parse("cpu")
    backend = get_backend("torch_triton", target)
    runner = backend.load(backend.lower(model, target, LowerOptions()), LoadOptions())
    dtypes = {value.name: value.dtype for value in model.graph.inputs}

    def run(inputs: Inputs) -> Outputs:
        feeds = {name: _typed(array, dtypes.get(name)) for name, array in inputs.items()}
        try:
            outputs = runner.run(feeds)
        except Exception as error:
            raise CouldNotRunError(f"PyTorch failed: {_brief(error)}") from error
        return {name: _plain(value) for name, value in zip(runner.output_names, outputs, strict=True)}

    return _Runner(run, runner.close)


def _by_evaluator(model: ir.Model) -> _Runner:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(ir.to_proto(model))
    dtypes = {value.name: value.dtype for value in model.graph.inputs}
    names = [value.name or "" for value in model.graph.outputs]

    def run(inputs: Inputs) -> Outputs:
        feeds = {name: _typed(array, dtypes.get(name)) for name, array in inputs.items()}
        try:
            with np.errstate(all="ignore"):  # what overflows is compared as it is
                outputs = evaluator.run(None, feeds)
        except Exception as error:
            raise CouldNotRunError(f"ONNX's reference evaluator failed: {_brief(error)}") from error
        return {name: _plain(value) for name, value in zip(names, outputs, strict=True)}

    return _Runner(run, lambda: None)


def _typed(array: Any, dtype: ir.DataType | None) -> Any:
    """In the declared dtype, where NumPy has none of its own: cases hold float32 in its place."""
    if not isinstance(array, np.ndarray) or dtype is None or dtype == ir.DataType.STRING:
        return array
    return array.astype(dtype.numpy()) if dtype.numpy().isbuiltin != 1 and array.dtype == np.float32 else array


def _plain(value: Any) -> Any:
    value = to_numpy(value)
    special = isinstance(value, np.ndarray) and value.dtype.isbuiltin != 1 and value.dtype.kind == "V"
    return value.astype(np.float32) if special else value


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
