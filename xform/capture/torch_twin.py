"""A stand-in for a user's module: other objects, the same tensors.

torch.export swaps a module's parameters for fake tensors while it traces, `forward` may write into buffers and
attributes, and evaluation mode is a flag on every submodule. None of that may reach the module that the user is
holding, and perhaps running in another thread. So whatever runs or traces a module here does it on a twin.

The twin has its own modules, dicts, lists, bound methods, closures and partials. It shares parameters, or all tensors.
Objects of other classes are shared, because they may be anything (a trainer, a tokenizer, a connection); what `forward`
assigns to their attributes is taken back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import torch

from xform.capture.torch_pytree import is_cache

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set)
_FASTPATH = threading.Lock()
_inside = 0
_before = True


@contextlib.contextmanager
def twin_of(
    module: torch.nn.Module, *, own_tensors: bool = False, written: Collection[str] = ()
) -> Iterator[torch.nn.Module]:
    """A twin of `module` in evaluation mode, without gradients inside; torch's random state is put back afterwards.

    The training flags are set one by one: `eval()` of some classes does more (it merges adapters into weights), or
    refuses.

    Args:
        own_tensors: Give the twin copies of buffers and of other tensors that are not parameters, for a run that may
            write into them. Without, all tensors are the module's own, for a trace that does not.
        written: Names of parameters that forward writes into, and that the twin gets copies of then too.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    maker = _Maker(own_tensors, {id(parameter) for name, parameter in parameters if name in written})
    twin = cast(torch.nn.Module, maker.copy(module))
    for child in twin.modules():
        child.training = False
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    with _unfused(), torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)), _taken_back(maker.shared):
        yield twin


class _Maker:
    """One copying of a tree of objects.

    Attributes:
        shared: Objects with attributes that the copy shares with the original.
    """

    def __init__(self, own_tensors: bool, written: Collection[int]) -> None:
        self.shared: list[Any] = []
        self._own_tensors = own_tensors
        self._written = written  # parameters, by id
        self._memo: dict[int, Any] = {}  # as copy.deepcopy wants it

    def copy(self, value: Any) -> Any:
        """The copy of any value; one copy per object, however often it is met."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        result: Any
        if isinstance(value, torch.Tensor):
            result = self._tensor(value)
        elif isinstance(value, torch.nn.Module) or _is_value(value):
            return self._object(value)
        elif type(value) in _CONTAINERS:
            return self._container(value)
        elif isinstance(value, MethodType):
            result = MethodType(value.__func__, self.copy(value.__self__))
        elif isinstance(value, FunctionType) and value.__closure__:
            return self._function(value, value.__closure__)
        elif type(value) is functools.partial:
            result = functools.partial(self.copy(value.func), *self.copy(value.args), **self.copy(value.keywords))
        else:
            result = value
            if hasattr(value, "__dict__") and not callable(value):
                self.shared.append(value)
        self._memo[id(value)] = result
        return result

    def _object(self, value: Any) -> Any:
        base = SimpleNamespace if isinstance(value, SimpleNamespace) else object
        result = self._memo[id(value)] = base.__new__(type(value))
        # not through setattr: modules have rules for it, and frozen dataclasses refuse
        vars(result).update({name: self.copy(attribute) for name, attribute in vars(value).items()})
        return result

    def _function(self, value: FunctionType, closure: tuple[CellType, ...]) -> FunctionType:
        cells = tuple(CellType() for _ in closure)
        result = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        self._memo[id(value)] = result
        result.__kwdefaults__ = value.__kwdefaults__
        vars(result).update(vars(value))
        for cell, original in zip(cells, closure, strict=True):
            with contextlib.suppress(ValueError):  # a name that has no value yet
                cell.cell_contents = self.copy(original.cell_contents)
        return result

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple([self.copy(element) for element in value])
        result = self._memo[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            result.update({key: self.copy(element) for key, element in value.items()})
        elif isinstance(value, list):
            result[:] = [self.copy(element) for element in value]
        else:
            result.clear()
            result.update(self.copy(element) for element in value)
        return result

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_shared = isinstance(tensor, torch.nn.Parameter) and id(tensor) not in self._written
        if is_shared or not self._own_tensors:
            return tensor
        if tensor.is_leaf and not tensor.is_meta:
            return copy.deepcopy(tensor, self._memo)  # views of one storage stay so
        return tensor.detach().clone()


def _is_value(value: Any) -> bool:
    """Whether an object is nothing but its attributes: a dataclass, a namespace, a cache of transformers."""
    if isinstance(value, (type, dict, list, tuple)) or not hasattr(value, "__dict__"):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace) or is_cache(type(value))


@contextlib.contextmanager
def _taken_back(objects: list[Any]) -> Iterator[None]:
    """Put back the attributes of objects that have others afterwards."""
    before = [(one, dict(vars(one))) for one in objects]
    try:
        yield
    finally:
        for one, attributes in before:
            now = vars(one)
            if now.keys() != attributes.keys() or any(now[name] is not value for name, value in attributes.items()):
                now.clear()
                now.update(attributes)


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """torch's fused encoder layers off: they give zeros at padded positions, where the layers as written, and so what
    torch.export captures, give other values that nobody is meant to read. The switch is the process's, so threads
    share one change of it.
    """
    global _inside, _before
    with _FASTPATH:
        _inside += 1
        if _inside == 1:
            _before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _FASTPATH:
            _inside -= 1
            if _inside == 0:
                torch.backends.mha.set_fastpath_enabled(_before)
