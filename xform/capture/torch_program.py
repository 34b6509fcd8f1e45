"""torch.export of a module that is called with its tensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind

from xform.capture.quiet import quiet
from xform.capture.torch_calling import Arguments, Results, Signature
from xform.capture.torch_settings import Settings

PREFIX = "module."
ASSIGNED = "xform.assigned"  # key in model.meta: names of attributes that forward changes


class _Holder:
    results: Results | None = None
    assigned: Mapping[str, tuple[Any, Any]] = MappingProxyType({})


class FlatModule(torch.nn.Module):
    """A module called with its tensors only, one after the other, that gives its result's tensors as a tuple.

    torch.export sees a flat signature this way, and how arguments and results are nested is known here alone.

    Args:
        module: The module to call; it becomes a submodule, so its tensors are called `module.<name>`.
        signature: How its calls are bound.
        arguments: An example call: its structure and plain values are part of every call.
    """

    def __init__(self, module: torch.nn.Module, signature: Signature, arguments: Arguments) -> None:
        super().__init__()
        self.module = module
        self.training = False
        self._signature = signature
        self._arguments = arguments
        # In an object of its own: torch.export undoes what a module assigns to its attributes, lists and dicts too.
        self._last = _Holder()

    @property
    def results(self) -> Results:
        """How the result of the last call is put together."""
        if self._last.results is None:
            raise RuntimeError("the module has not been called yet")
        return self._last.results

    @property
    def assigned(self) -> Mapping[str, tuple[Any, Any]]:
        """What the last call changed of the module beside its tensors: by name, the values before and after."""
        return self._last.assigned

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Call the module with these tensors in the places of the example's, and remember the result's structure."""
        arguments = self._arguments.tree(tensors)
        args, kwargs = self._signature.call_form(arguments)
        before = Settings(self.module)
        result = self.module(*args, **kwargs)
        self._last.assigned = before.changed()
        outputs, self._last.results = Results.of(result, arguments)
        return tuple(outputs)


def export(
    module: FlatModule, tensors: Mapping[str, torch.Tensor], shapes: Sequence[Mapping[int, Any]]
) -> ExportedProgram:
    """torch.export of a flat module; what torch prints and notes meanwhile is not the user's to act on.

    Raises:
        Exception: Whatever torch.export raises, user code included.
    """
    with quiet():
        dynamic_shapes = {"tensors": tuple(dict(shape) for shape in shapes)} if any(shapes) else None
        return torch.export.export(module, tuple(tensors.values()), dynamic_shapes=dynamic_shapes, strict=False)


def constant_outputs(program: ExportedProgram) -> dict[int, Any]:
    """Outputs of a program, by index, that are plain values: sizes that turned out to be fixed."""
    specs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    return {i: s.arg.value for i, s in enumerate(specs) if isinstance(s.arg, ConstantArgument)}
