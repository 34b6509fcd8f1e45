"""A torch module, optimized: captured when it is first called, and again when a call or its weights ask for it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch.export import ExportedProgram

from xform.capture.torch_calling import Signature
from xform.capture.torch_module import CapturedModule, capture_torch
from xform.compilation import Compiled, Request
from xform.errors import CaptureError, TargetError, UsageError, VerificationError
from xform.forks import settle
from xform.limits import earned_by, limited
from xform.optimized.base import Optimized
from xform.optimized.calls import call_arguments, check_runs, module_oracle, verification_inputs
from xform.optimized.compiling import compile_and_tell
from xform.optimized.generation import driving, generate_with
from xform.optimized.weights import ModuleWeights, SharedWeights
from xform.report.brief import verdict
from xform.rewrite.remarks import Remark

_LOG = logging.getLogger("xform")
_MAX_PROGRAMS = 8  # graphs kept for one module, as a call with other plain values or static sizes needs one of its own
_NAMED = 3  # weights named in a message
_LIVE: weakref.WeakSet[OptimizedModule] = weakref.WeakSet()


@dataclass(frozen=True)
class Program:
    """One captured graph of a module, compiled.

    Attributes:
        shared: Weights that the artifact reads from the module's memory.
    """

    captured: CapturedModule
    compiled: Compiled
    shared: SharedWeights


class OptimizedModule(Optimized):
    """An optimized torch module, called with the module's own arguments and giving its own results.

    It computes what the module computes in evaluation mode, without gradients. It captures at the first call, or at
    once where inputs are given, and again only for a call that the graphs so far do not cover (another plain value or
    structure among the arguments, another dtype, another size of a dim that is not dynamic), or after the module has
    changed: its weights, attributes, submodules or hooks. Each such capture is told as a warning, and in the report as
    a remark of "capture". After a second size, the dims that differed are captured as dynamic ones where the module
    allows it.

    Calls from several threads are safe, and run side by side once there is a graph for them.

    Attributes:
        original: The module.
        captures: How often it was captured.
    """

    def __init__(self, module: torch.nn.Module | ExportedProgram, request: Request, dynamic: Any) -> None:
        self.original = module
        self.captures = 0
        self._request = request
        self._dynamic = dynamic
        self._programs: tuple[Program, ...] = ()  # most recently used first; replaced as a whole, never changed
        self._weights: ModuleWeights | None = None
        self._parts: dict[str, OptimizedModule] = {}
        self._lock = threading.RLock()
        _LIVE.add(self)

    @property
    def _compiled(self) -> Compiled:
        return self._first().compiled

    def _first(self) -> Program:
        programs = self._programs
        if not programs:
            raise UsageError("nothing was captured yet", hint="call it once, or give inputs= to optimize")
        return programs[0]

    def prepare(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Capture and compile for calls like this one, unless that has been done."""
        self._program(args, kwargs or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, as the module's `forward` would."""
        program, feeds = self._bound(args, kwargs)
        outputs = [_tensor(output) for output in program.compiled.runner.run(feeds)]
        if program.captured.writes_caches:  # so that the caches given are written, as the module does
            return program.captured.unflatten(outputs, args, kwargs)
        return program.captured.unflatten(outputs)

    @property
    def generate(self) -> Callable[..., Any]:
        """The module's own `generate` (Hugging Face), with the optimized model in the place of its forward.

        Raises:
            AttributeError: The module has none.
        """
        if not callable(getattr(self.original, "generate", None)):
            raise AttributeError(f"{type(self.original).__name__} has no generate()")
        try:
            return generate_with(self)
        except AttributeError as error:  # as it is, Python would take it for `generate` not being there
            return _cannot_generate(self.original, error)

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the module's forward."""
        return Signature.of(self.original).signature

    def part(self, name: str, module: torch.nn.Module) -> OptimizedModule:
        """A part of the module that is called by itself, optimized as this one was asked to be; one per name."""
        with self._lock:
            if name not in self._parts or self._parts[name].original is not module:
                self._parts[name] = OptimizedModule(module, self._request, "auto")
            return self._parts[name]

    def __getattr__(self, name: str) -> NoReturn:
        """Say where attributes of the module are to be found; only called for what is not here."""
        if name.startswith("_") or not hasattr(self.original, name):
            raise AttributeError(f"an optimized module has no attribute {name!r}")
        raise AttributeError(
            f"an optimized module has no attribute {name!r}; the module itself, which has, is `.original`: "
            f".original.{name}"
        )

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, Any]]:
        """The graph for this call, and its inputs. The last used one is tried first, in one pass over the arguments."""
        # weights first: another thread may capture again between the two, and then these say that they have changed
        weights = self._weights
        programs = self._programs
        if programs and weights is not None and not weights.changed():
            with contextlib.suppress(UsageError):  # another graph may take this call, or one has to be captured
                return programs[0], programs[0].captured.flatten(args, kwargs)
        program = self._program(args, kwargs)
        return program, program.captured.flatten(args, kwargs)

    def _program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
        """The compiled graph that covers this call; several threads that ask for one get it captured once."""
        settle()
        with self._lock:
            stale = self._drop_stale()
            refusals = []
            for program in self._programs:
                refused = program.captured.refuses(args, kwargs)
                if refused is None:
                    self._keep(program)
                    return program
                refusals.append(refused)
            program = self._compile(args, kwargs, stale or next(iter(refusals), ""))
            self._keep(program)
            return program

    def _keep(self, program: Program) -> None:
        """Put a program first. Those beyond the limit go; a thread that runs one still holds it."""
        others = tuple(one for one in self._programs if one is not program)
        self._programs = (program, *others)[:_MAX_PROGRAMS]
        if len(others) >= _MAX_PROGRAMS:
            gc.collect()  # a graph's nodes and values refer to each other

    def _drop_stale(self) -> str:
        """Forget the graphs if the module is not what it was; why, or an empty text."""
        if self._weights is None or not self._weights.changed():
            return ""
        weights, settings = self._weights.names(), self._weights.settings()
        names = [*weights, *settings]
        self._programs, self._weights = (), None
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        what = "the module has changed" if settings else "the module's weights have changed"
        return f"{what} ({', '.join(names[:_NAMED])}{more})"

    def _compile(self, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str) -> Program:
        varied = next(filter(None, (p.captured.varied(args, kwargs) for p in self._programs)), {})
        if varied:
            with contextlib.suppress(VerificationError):  # other sizes need other graphs; static ones then
                return self._compile_for(args, kwargs, reason, varied)
        try:
            return self._compile_for(args, kwargs, reason, {})
        except VerificationError as error:
            if self._dynamic != "auto" or self._request.strict:
                raise
            # torch.export takes a dynamic size for 2 or more, so what a module does with 1 alone is not in its graph
            note = f"all sizes are fixed at those of this call, because with dynamic ones {error.what}"
            return self._compile_for(args, kwargs, reason, {}, fixed=note)

    def _compile_for(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        reason: str,
        varied: Mapping[str, set[int]],
        fixed: str = "",
    ) -> Program:
        """Capture and compile.

        Args:
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            reason: Why it is captured again; empty at a first capture.
            varied: Axes that had other sizes in earlier calls, by input.
            fixed: Why sizes are not to be dynamic; empty where they may be.
        """
        start = time.perf_counter()
        name = type(self.original).__name__
        _LOG.info("%s: capturing%s", name, f" again, because {reason}" if reason else "")
        weights = self._weights or ModuleWeights(self.original)  # before: another thread may change it meanwhile
        captured = capture_torch(self.original, args, kwargs, dynamic=None if fixed else self._dynamic, varied=varied)
        if weights is not self._weights:
            weights.leave_out(captured.model)
        seconds = time.perf_counter() - start
        example = {name: tensor.detach().clone() for name, tensor in captured.flatten(args, kwargs).items()}
        notes = [*self._notes(captured, reason), *filter(None, [fixed])]
        oracle = module_oracle(self.original, captured, example)
        try:
            with limited(self._request.limits), limited(earned_by(example)):
                compiled = compile_and_tell(
                    captured.model,
                    self._request,
                    notes,
                    source=name,
                    inputs=verification_inputs(captured, example),
                    oracle=oracle,
                    capture_seconds=seconds,
                    flatten=lambda sample: captured.flatten(*call_arguments(sample)),
                )
        except (TargetError, VerificationError):
            check_runs(name, oracle, example)
            raise
        if reason:
            remark = Remark("capture", "recapture", "applied", (), f"captured again, because {reason}", "capture")
            compiled.report.remarks.insert(0, remark)
        shared = SharedWeights(getattr(compiled.artifact, "model", None), self.original)
        self.captures += 1
        self._weights = weights
        return Program(captured, compiled, shared)

    def _notes(self, captured: CapturedModule, reason: str) -> list[str]:
        """What the user should know about this capture."""
        notes = []
        name = type(self.original).__name__
        expected = driving.get() and self._weights is not None  # which it is not after the weights have changed
        if reason and not expected:
            notes.append(f"{name} was captured again, because {reason}")
        elif not reason and isinstance(self.original, torch.nn.Module) and _trains(self.original):
            notes.append(f"{name} is in training mode; what it computes in evaluation mode was captured")
        if captured.aliased and not self.captures:
            notes.append(
                f"{', '.join(captured.aliased)} shared memory with another argument or with the module in the first "
                "call; each argument is an input of its own"
            )
        if self.captures + 1 == _MAX_PROGRAMS:
            notes.append(
                f"{name} was captured {_MAX_PROGRAMS} times; from now on the graph that was not used for longest is "
                "forgotten. Give dynamic= the dims that vary, to capture it once"
            )
        return notes

    def _check_unchanged(self) -> None:
        self._first().shared.check()

    def _device(self) -> str:
        return self._request.target.kind

    def _float_dtypes(self) -> set[Any]:
        if self._programs:
            return super()._float_dtypes()
        return {p.dtype for p in self.original.parameters() if p.is_floating_point()}

    def _described(self) -> str:
        name, backend, target = type(self.original).__name__, self._request.backend.name, self._request.target
        programs = self._programs
        if not programs:
            return f"{name}: {backend} on {target}, not captured yet"
        report = programs[0].compiled.report
        times = "once" if self.captures == 1 else f"{self.captures} times"
        return f"{name}: {report.backend} on {target}, captured {times}, {verdict(report)}"


def _trains(module: torch.nn.Module) -> bool:
    """Whether a module is in training mode and some code of it asks for the mode, as that of dropout does."""
    kinds = {base for child in module.modules() if child.training for base in type(child).__mro__[:-1]}
    functions = [f for kind in kinds - {torch.nn.Module} for f in vars(kind).values() if inspect.isfunction(f)]
    return any("training" in function.__code__.co_names for function in functions)


def _tensor(output: Any) -> Any:
    return torch.from_numpy(output) if isinstance(output, np.ndarray) else output


def _renew_locks() -> None:
    """In a forked child: a thread that held a lock is not there to release it."""
    for one in list(_LIVE):
        one._lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


def _cannot_generate(module: torch.nn.Module, error: Exception) -> Callable[..., NoReturn]:
    """What raises CaptureError when it is called: only then is it known that anyone wants to generate."""

    def generate(*_: Any, **__: Any) -> NoReturn:
        raise CaptureError(f"generate() of {type(module).__name__} cannot be driven: {error}") from error

    return generate
