"""A PyTorch module as a graph, and the way back: calls with the module's own arguments and results."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from xform.capture import torch_dynamic
from xform.capture.onnx_file import notes
from xform.capture.torch_calling import Arguments, Autocast, Results, Signature, autocast_now
from xform.capture.torch_dynamic import DimRequest, Dynamic, Sizes
from xform.capture.torch_errors import capture_error
from xform.capture.torch_graph import canonical_container
from xform.capture.torch_normalize import normalize
from xform.capture.torch_onnx import draws_random_numbers, translate
from xform.capture.torch_program import ASSIGNED, FlatModule, constant_outputs, export
from xform.capture.torch_pytree import is_lazy, is_same_value
from xform.capture.torch_twin import twin_of
from xform.errors import CaptureError, UsageError

Source = torch.nn.Module | ExportedProgram

_PLACE = re.compile(r"\btensors_(\d+)\b")  # what torch calls the inputs of a FlatModule
_LOCK = threading.RLock()  # of the one capture that may run in a process


def _forget_lock() -> None:
    """In a forked child: the thread that held the lock is not there to release it."""
    global _LOCK
    _LOCK = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)


@dataclasses.dataclass(frozen=True)
class CapturedModule:
    """A captured module: its graph, and how calls of the module become calls of the graph.

    Attributes:
        model: The graph. Inputs are named after the parameters of `forward` (`ids`, `images_0`, `batch.mask`),
            outputs after the fields of the result (`logits`, `output_1`), initializers as in the `state_dict`, whose
            tensors they share.
        dynamic_dims: Per input, its dynamic axes with their names; equal names are equal sizes.
        aliased: Inputs that shared memory with another input, or with the module, in the example call.
    """

    model: ir.Model
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    sizes: Sizes
    _signature: Signature
    _example: Arguments
    _results: Results
    _autocast: Autocast
    aliased: tuple[str, ...] = ()

    @property
    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        return self.sizes.dims()

    @property
    def dim_ranges(self) -> dict[str, tuple[int, int | None]]:
        """Smallest and largest size (None: no limit) per name of a dynamic dim."""
        return dict(self.sizes.ranges)

    def flatten(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The graph's inputs by name for one call of the module.

        Complex tensors come as real ones with a last dim of 2, as the graph takes them.

        Raises:
            UsageError: The call is not one that was captured: other arguments, other plain values, dtypes or sizes.
        """
        arguments = self._signature.flatten(args, kwargs or {})
        if (reason := self._mismatch(arguments)) is not None:
            raise UsageError(
                f"this call differs from the captured one: {reason}",
                hint="capture again with these arguments, or with dynamic dims where only sizes differ",
            )
        return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in arguments.tensors.items()}

    def unflatten(
        self, outputs: Sequence[torch.Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The module's result, in its own classes, from the graph's outputs in order.

        Args:
            outputs: One tensor per graph output.
            args: The positional arguments of the call, where they may hold key/value caches. Modules write into the
                caches that they are given and return them; with the arguments at hand so does this, without them the
                result holds new caches.
            kwargs: The keyword arguments of the call.

        Raises:
            UsageError: Not one tensor for every graph output.
        """
        bound = self._signature.bind(args, kwargs or {}) if args or kwargs else None
        return self._results.build(outputs, bound)

    def call_form(self, tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs` of a call of the module with these graph inputs: the inverse of `flatten`.

        Raises:
            UsageError: Not one tensor for every input of the graph.
        """
        if set(tensors) != set(self.input_names):
            raise UsageError(f"expected the inputs {list(self.input_names)}, got {list(tensors)}")
        originals = self._example.tensors
        values = [
            torch.view_as_complex(tensors[name].contiguous()) if original.is_complex() else tensors[name]
            for name, original in originals.items()
        ]
        return self._signature.call_form(self._example.tree(values))

    def leaves(self, result: Any) -> list[torch.Tensor]:
        """The graph's outputs, in order, from a result of the module: the inverse of `unflatten`."""
        tensors = [torch.as_tensor(leaf) for leaf in self._results.leaves(result)]
        return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]

    def accepts(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether a call is one that was captured: the same but for tensor values and sizes of dynamic dims."""
        return self.refuses(args, kwargs) is None

    def refuses(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
        """Why a call is not one that was captured, or None if it is."""
        return self._mismatch(self._signature.flatten(args, kwargs or {}))

    def varied(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, set[int]]:
        """Per input, the axes in which a call's sizes differ from those captured, and the dynamic ones.

        Empty where the call differs in more than sizes.
        """
        arguments = self._signature.flatten(args, kwargs)
        if self._differs(arguments) is not None:
            return {}
        return self.sizes.varied(arguments.tensors)

    @property
    def writes_caches(self) -> bool:
        """Whether the module returns key/value caches that it was given, having written into them."""
        return bool(self._results.written)

    def _mismatch(self, arguments: Arguments) -> str | None:
        reason = self._differs(arguments)
        return self.sizes.mismatch(arguments.tensors) if reason is None else reason

    def _differs(self, arguments: Arguments) -> str | None:
        """What else than sizes differs from the captured call."""
        if (now := autocast_now()) != self._autocast:
            before = ", ".join(self._autocast) or "off"
            return f"autocast is {', '.join(now) or 'off'}, and was {before} at the capture"
        example = self._example
        if arguments.order != example.order:
            more = [name for name in arguments.order if name not in example.order]
            fewer = [name for name in example.order if name not in arguments.order]
            told = (("the argument", more), ("no argument", fewer))
            found = [f"{words} {_some(names)}" for words, names in told if names]
            return f"it has {' and '.join(found) or 'its arguments in another order'}, other than the captured one"
        if list(arguments.tensors) != list(example.tensors):
            differ = sorted(arguments.tensors.keys() ^ example.tensors.keys())
            return f"{_some(differ)} is a tensor in one of the calls only"
        for name, value in example.constants.items():
            if not is_same_value(arguments.constants[name], value):
                return f"{name} is {arguments.constants[name]!r}, captured with {value!r}"
        if arguments.spec is not example.spec and arguments.spec != example.spec:
            return "its arguments are nested differently"
        for name, tensor in example.tensors.items():
            if arguments.tensors[name].dtype is not tensor.dtype:
                return f"{name} is {arguments.tensors[name].dtype}, captured with {tensor.dtype}"
        return None


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def capture_torch(
    module: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = None,
    varied: Mapping[str, Collection[int]] | None = None,
) -> CapturedModule:
    """Capture a module as a graph that computes what the module computes in evaluation mode.

    The module is left alone: a stand-in with the same tensors is captured, and the graph shares these tensors. One
    capture at a time runs in a process, as torch.export is not made for more.

    Args:
        module: An nn.Module, an fx.GraphModule, or an ExportedProgram (which brings its own inputs and dynamic dims).
        args: Example positional arguments. Tensors become graph inputs, each one of its own, also where several share
            memory; numbers, strings and None are part of the capture.
        kwargs: Example keyword arguments.
        dynamic: Which sizes may differ from call to call. None or False: none. `"auto"` or True: batch and sequence
            dims are found. A dict names dims of graph inputs: `{"ids": {0: "batch", 1: ("seq", 1, 512)}}`.
        varied: Axes that had other sizes in earlier calls, by input: dynamic too, if the module can be captured so.

    Raises:
        UsageError: Arguments that do not fit, or a malformed `dynamic`.
        CaptureError: torch.export or the translation to ONNX failed; says at which line of the model, and what to try.
    """
    if isinstance(dynamic, bool):
        dynamic = "auto" if dynamic else None
    if isinstance(module, ExportedProgram):
        return _capture_program(module, args, kwargs, dynamic, varied or {})
    module = _checked(module)
    signature = Signature.of(module)
    arguments = signature.flatten(args, kwargs or {})
    requests = torch_dynamic.parse(dynamic, arguments.tensors)
    return _capture_twin(module, signature, arguments, requests, dynamic, varied or {})


def _capture_program(
    program: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic: Dynamic,
    varied: Mapping[str, Collection[int]],
) -> CapturedModule:
    """Capture an exported program with the inputs and dynamic dims that it was exported with, or others where given."""
    if not args and not kwargs:
        if program.example_inputs is None:
            raise UsageError("the exported program carries no example inputs", hint="give args and kwargs")
        args, kwargs = program.example_inputs
    module = program.module(check_guards=False)
    signature = Signature.of_program(program, module)
    arguments = signature.flatten(args, kwargs or {})
    if dynamic is None:
        requests = torch_dynamic.dims_of(program, list(arguments.tensors))
    else:
        requests = torch_dynamic.parse(dynamic, arguments.tensors)
    return _capture_twin(module, signature, arguments, requests, dynamic, varied)


def _capture_twin(
    module: torch.nn.Module,
    signature: Signature,
    arguments: Arguments,
    requests: dict[str, dict[int, DimRequest | None]],
    dynamic: Dynamic,
    varied: Mapping[str, Collection[int]],
) -> CapturedModule:
    arguments, aliased = arguments.apart((*module.parameters(), *module.buffers()))
    with _LOCK, twin_of(module) as twin:
        captured = _capture(twin, signature, arguments, requests, dynamic, varied)
    return dataclasses.replace(captured, aliased=aliased)


def _checked(module: Any) -> torch.nn.Module:
    if isinstance(module, (str, bytes, os.PathLike)):
        raise CaptureError(
            f"{module!r} is not a module; files of pickled torch objects are never loaded",
            hint="build the module in Python, load its weights there (safetensors), and pass the module",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module cannot be captured", hint="pass the nn.Module it was made from")
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"cannot capture a {type(module).__name__}", hint="pass an nn.Module or an ExportedProgram")
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"{_some(lazy)} of {type(module).__name__} is not initialized: a lazy module learns its sizes in a call",
            hint="call the module once with such inputs, and optimize it then",
        )
    return getattr(module, "_orig_mod", module)  # what torch.compile wrapped


def _capture(
    module: torch.nn.Module,
    signature: Signature,
    arguments: Arguments,
    requests: dict[str, dict[int, DimRequest | None]],
    dynamic: Dynamic,
    varied: Mapping[str, Collection[int]],
) -> CapturedModule:
    name = type(module).__name__
    attempts = torch_dynamic.attempts(arguments.tensors, requests, dynamic, varied)
    failures: list[CaptureError] = []
    for tensors, tried in attempts:
        try:
            captured = _attempt(module, signature, arguments, tensors, tried)
            if (refused := captured.sizes.mismatch(arguments.tensors)) is not None:  # its examples were lengthened
                raise CaptureError(f"{name} as captured does not take these arguments: {refused}")
        except CaptureError as error:
            failures.append(error)
            continue
        if failures and dynamic == "auto":
            notes(captured.model).append(
                f"not every dim of {name} that might be dynamic could be captured so: {failures[0].what}"
            )
        notes(captured.model).extend(_narrower(captured, requests, dynamic))
        return captured
    # The last attempt asks for least: what stops it is the module's own trouble.
    raise failures[-1]


def _narrower(
    captured: CapturedModule, requests: Mapping[str, Mapping[int, DimRequest | None]], dynamic: Dynamic
) -> Iterator[str]:
    """What was asked to be dynamic and is not, or not in any size."""
    dims = captured.dynamic_dims
    if dynamic == "auto":
        batched = [name for name, axes in requests.items() if 0 in axes]
        if batched and not any(0 in dims.get(name, {}) for name in batched):
            size = captured.sizes.shapes[batched[0]][0]
            yield f"the batch is fixed at {size} (axis 0 of {batched[0]}): each other batch size is captured again"
    open_ended = {r.name for axes in requests.values() for r in axes.values() if r is not None and r.high is None}
    for name in sorted(open_ended):
        low, high = captured.dim_ranges.get(name, (1, None))
        if high is not None or low > 2:
            allowed = f"{low} and more" if high is None else f"{low} to {high}"
            yield f"dim {name!r} takes the sizes {allowed}, no others"


def _attempt(
    module: torch.nn.Module,
    signature: Signature,
    arguments: Arguments,
    tensors: Mapping[str, torch.Tensor],
    requests: Mapping[str, Mapping[int, DimRequest | None]],
) -> CapturedModule:
    """Export and translate with these example tensors and dynamic dims.

    Raises:
        CaptureError: Either failed.
    """
    name = type(module).__name__
    flat = FlatModule(module, signature, arguments)
    try:
        program = export(flat, tensors, torch_dynamic.export_shapes(tensors, requests))
    except Exception as error:
        raise capture_error(f"torch.export cannot capture {name}", error, list(tensors)) from error
    sizes, symbols = torch_dynamic.sizes_of(program, list(arguments.tensors), requests)
    for fixed, axes in requests.items():
        for axis, request in axes.items():
            if request is not None and isinstance(size := sizes.shapes[fixed][axis], int):
                raise CaptureError(
                    f"{name} takes one size of dim {request.name!r}: axis {axis} of {fixed} is always {size}",
                    hint="leave this dim out of `dynamic`, or use dynamic='auto'",
                )
    results = flat.results.settled(constant_outputs(program))
    try:
        normalize(program)
        model = translate(program)
    except Exception as error:
        raise capture_error(f"{name} cannot be translated to ONNX", error, list(tensors)) from error
    names = list(arguments.tensors)
    notes(model)[:] = [_PLACE.sub(lambda match: names[int(match[1])], note) for note in notes(model)]
    if not results.names:
        raise CaptureError(
            f"{name} returns nothing that is computed from its inputs",
            hint="call the module itself with these arguments; there is nothing to optimize",
        )
    if draws_random_numbers(model):
        notes(model).append(
            f"forward of {name} draws random numbers; the optimized model draws others, and other ones in every run"
        )
    model.meta[ASSIGNED] = tuple(flat.assigned)
    notes(model).extend(
        f"forward changes its attribute {changed}; the captured graph computes with what it was when it was captured, "
        "at every call, and changes nothing"
        for changed, (before, after) in flat.assigned.items()
        if isinstance(before, (bool, int, float)) and type(after) is type(before)
    )
    model = canonical_container(model, list(arguments.tensors), results.names, symbols)
    outputs = tuple(value.name or "" for value in model.graph.outputs)
    interface = tuple(arguments.tensors), outputs, sizes, signature
    return CapturedModule(model, *interface, arguments, results, autocast_now())
