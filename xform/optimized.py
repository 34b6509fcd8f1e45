"""What `optimize` returns: something to call like the original, and to ask what was done."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from xform.backends import Artifact
from xform.capture.torch_module import CapturedModule, capture_torch
from xform.capture.torch_program import evaluating
from xform.compilation import Compiled, Request, compile_graph
from xform.errors import UsageError
from xform.report.files import write_report
from xform.report.schema import Report
from xform.rewrite.remarks import Remark

_MAX_PROGRAMS = 8  # graphs kept for one module, as a call with other plain values or static sizes needs one of its own


class Optimized(ABC):
    """An optimized model.

    Attributes:
        report: What was done, with sizes, errors and times.
        graph: The canonical graph after the passes.
        artifact: The lowered model.
    """

    @property
    @abstractmethod
    def _compiled(self) -> Compiled:
        """The compilation that questions are about."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""

    @property
    def report(self) -> Report:
        """See the class. Grows when a backend decides something at a first run."""
        self._compiled.note_choices()
        return self._compiled.report

    @property
    def graph(self) -> ir.Model:
        """See the class."""
        return self._compiled.graph

    @property
    def artifact(self) -> Artifact:
        """See the class."""
        return self._compiled.artifact

    def explain(self, concept: str | None = None) -> str:
        """What was done and what was not, and why: everything, or about one concept, pass or rule ("attention")."""
        report = self.report
        remarks = report.remarks if concept is None else report.about(concept)
        if concept is not None and not remarks:
            known = sorted({name for r in report.remarks for name in (r.concept, r.pass_name)} | {*report.concepts})
            found = report.concepts.get(concept, 0)
            return f"{concept}: {found} in the result, no remarks. Remarks are about: {', '.join(filter(None, known))}"
        head = [f"{concept}: {report.concepts.get(concept, 0)} in the result"] if concept is not None else []
        return "\n".join([*head, *map(_line, remarks)])

    def save(self, path: str | os.PathLike[str], *, report: bool = False) -> list[Path]:
        """Write the lowered model, atomically.

        Args:
            report: Write `report.json` into the same folder too.

        Returns:
            Every file written.

        Raises:
            OutputError: The files cannot be written.
            UsageError: The path is that of the input.
        """
        target = Path(path)
        files = self.artifact.save(target)
        if report:
            files = [*files, target.with_name("report.json")]
            write_report(self.report, files[-1])
        return files


def _line(remark: Remark) -> str:
    nodes = ", ".join(remark.nodes[:4]) + (f" and {len(remark.nodes) - 4} more" if len(remark.nodes) > 4 else "")
    verdict = {"applied": "done", "missed": "missed", "rolled_back": "undone"}[remark.verdict]
    name = "/".join(part for part in (remark.pass_name, remark.rule) if part)
    text = f"  {verdict:7s}{name}" + (f" at {nodes}" if nodes else "")
    return text + (f": {remark.reason}" if remark.reason else "")


class OptimizedGraph(Optimized):
    """An optimized ONNX model.

    Call it with arrays in the order of the graph's inputs, by name, or with one dict of names; it returns a dict of
    output name to array. Torch tensors in give torch tensors out.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._result = compiled

    @property
    def _compiled(self) -> Compiled:
        return self._result

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run it.

        Raises:
            UsageError: Inputs that are missing or unknown, or of another dtype or rank than declared.
        """
        runner = self._result.runner
        by_name = dict(args[0]) if len(args) == 1 and isinstance(args[0], Mapping) else None
        positional = args if by_name is None else ()
        if len(positional) > len(runner.input_names):
            raise UsageError(f"{len(positional)} inputs were given, the model takes {len(runner.input_names)}")
        feeds = by_name or dict(zip(runner.input_names, positional, strict=False))
        twice = sorted(feeds.keys() & kwargs.keys())
        if twice:
            raise UsageError(f"input {twice[0]!r} was given twice")
        return dict(zip(runner.output_names, runner.run({**feeds, **kwargs}), strict=True))


class OptimizedModule(Optimized):
    """An optimized torch module, called with the module's own arguments and giving its own results.

    It computes what the module computes in evaluation mode, without gradients. It captures at the first call, or at
    once where inputs are given, and again only for a call that the graphs so far do not cover: another plain value or
    structure among the arguments, another dtype, or another size of a dim that is not dynamic. Each such capture is
    told in the report as a remark of "capture".

    Attributes:
        original: The module.
        captures: How often it was captured.
    """

    def __init__(self, module: torch.nn.Module | ExportedProgram, request: Request, dynamic: Any) -> None:
        self.original = module
        self.captures = 0
        self._request = request
        self._dynamic = dynamic
        self._programs: list[tuple[CapturedModule, Compiled]] = []

    @property
    def _compiled(self) -> Compiled:
        if not self._programs:
            raise UsageError("nothing was captured yet", hint="call it once, or give inputs= to optimize")
        return self._programs[0][1]

    def prepare(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Capture and compile for calls like this one, unless that has been done."""
        self._program(args, kwargs or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, as the module's `forward` would."""
        captured, compiled, feeds = self._bound(args, kwargs)
        outputs = compiled.runner.run(feeds)
        return captured.unflatten([_tensor(output) for output in outputs])

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CapturedModule, Compiled, dict[str, Any]]:
        """The graph for this call, and its inputs. The last used one is tried first, in one pass over the arguments."""
        if self._programs:
            captured, compiled = self._programs[0]
            with contextlib.suppress(UsageError):  # another graph may take this call, or one has to be captured
                return captured, compiled, captured.flatten(args, kwargs)
        captured, compiled = self._program(args, kwargs)
        return captured, compiled, captured.flatten(args, kwargs)

    def _program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CapturedModule, Compiled]:
        """The compiled graph that covers this call, most recently used first."""
        reason = ""
        for index, program in enumerate(self._programs):
            refused = program[0].refuses(args, kwargs)
            if refused is None:
                if index:
                    self._programs.insert(0, self._programs.pop(index))
                return program
            reason = reason or refused
        program = self._compile(args, kwargs, reason)
        self._programs.insert(0, program)
        for _, old in self._programs[_MAX_PROGRAMS:]:
            old.close()
        del self._programs[_MAX_PROGRAMS:]
        return program

    def _compile(self, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str) -> tuple[CapturedModule, Compiled]:
        start = time.perf_counter()
        captured = capture_torch(self.original, args, kwargs, dynamic=self._dynamic)
        seconds = time.perf_counter() - start
        self.captures += 1
        example = {name: tensor.detach().clone() for name, tensor in captured.flatten(args, kwargs).items()}
        compiled = compile_graph(
            captured.model,
            self._request,
            source=type(self.original).__name__,
            inputs=example,
            oracle=_oracle(self.original, captured, example),
            capture_seconds=seconds,
            flatten=lambda sample: captured.flatten(*call_arguments(sample)),
        )
        if reason:
            remark = Remark("capture", "recapture", "applied", (), f"captured again, because {reason}", "capture")
            compiled.report.remarks.insert(0, remark)
            compiled.report.warnings.append(remark.reason)
        return captured, compiled


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` of a call from the forms that `optimize` takes."""
    match inputs:
        case (tuple() | list() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
        case Mapping():
            return (), dict(inputs)
        case tuple() | list():
            return tuple(inputs), {}
        case _:
            return (inputs,), {}


def _oracle(
    module: torch.nn.Module | ExportedProgram, captured: CapturedModule, example: Mapping[str, torch.Tensor]
) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    """The module itself as a function from graph inputs to graph outputs; it gets copies, as it may write into them."""
    callee = module.module() if isinstance(module, ExportedProgram) else module

    def run(inputs: Mapping[str, Any]) -> Sequence[Any]:
        tensors = {name: torch.as_tensor(value).to(example[name]).clone() for name, value in inputs.items()}
        args, kwargs = captured.call_form(tensors)
        refused = captured.refuses(args, kwargs)
        if refused is not None:
            raise UsageError(f"this call would need another graph: {refused}")
        with evaluating(callee):
            return captured.leaves(callee(*args, **kwargs))

    run.name = "the module, run by PyTorch"  # type: ignore[attr-defined]
    return run


def _tensor(output: Any) -> Any:
    return torch.from_numpy(output) if isinstance(output, np.ndarray) else output
