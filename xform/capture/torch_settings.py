"""What a module's forward may read beside its parameters and buffers: attributes, submodules, hooks, lists, configs.

A captured graph has all of it built in. So it has to be told when the user changes `module.scale`, `config.use_cache`
or a hook afterwards, and when forward itself does (a counter), which a graph cannot repeat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, list, set)
_OPAQUE = (type, FunctionType, MethodType, ModuleType, torch.Tensor, torch.nn.Module)
_LARGE = 256  # elements of a list or dict beyond which only their number is compared: a vocabulary, not a setting
_DEPTH = 4  # how deep lists, dicts and configurations are looked into
_ABSENT = object()
_IRRELEVANT = frozenset({"training", "_compiled_call_impl", "_is_full_backward_hook", "_non_persistent_buffers_set"})
# Of what every module has in its __dict__, only these tables say what forward does; the mode is always evaluation.
_TABLES = ("_modules", "_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(torch.nn.Module()))


class _Watched:
    """Dicts, lists or sets of one object, each with a copy of what it held.

    Attributes:
        name: Name of the object, empty for the module itself.
    """

    def __init__(self, name: str, *live: Any, hooks: int | None = None, elements: bool = False) -> None:
        self.name = name
        self._elements = elements  # they are elements of a container, not attributes of an object
        self._live = live
        self._seen = tuple(map(_copied, live))
        self._hooks = hooks  # from this one on, they are tables of hooks

    def differs(self, ignored: Collection[str]) -> bool:
        """Whether anything is not what it was: fast where all objects are the same ones."""
        with contextlib.suppress(Exception):  # what comparing some object of the user's raises: by identity, then
            if self._live == self._seen:
                return False
        if self.changed(ignored):
            return True
        self._seen = tuple(map(_copied, self._live))  # what forward itself writes, in a run of the user's
        return False

    def changed(self, ignored: Collection[str]) -> dict[str, tuple[Any, Any]]:
        """What is not what it was. Compares numbers and texts only, all else by identity."""
        found: dict[str, tuple[Any, Any]] = {}
        for place, (live, seen) in enumerate(zip(self._live, self._seen, strict=True)):
            now, before = _as_dict(live), _as_dict(seen)
            if self._elements and now.keys() != before.keys():  # a list that grows, a cache that is filled
                if not _is_in(self.name, ignored):
                    found[self.name] = before, now
                continue
            for key in dict.fromkeys([*before, *now]):
                values = before.get(key, _ABSENT), now.get(key, _ABSENT)
                name = self._name(place, key)
                if not _is_same(*values) and key not in _IRRELEVANT and not _is_in(name, ignored):
                    found[name] = values
        return found

    def _name(self, place: int, key: Any) -> str:
        if self._hooks is not None and place >= self._hooks:
            return f"the hooks of {self.name or 'the module'}"
        if key in _TABLES:  # another table in the place of this one
            return f"the submodules or hooks of {self.name or 'the module'}"
        return f"{self.name}.{key}" if self.name else str(key)


class Settings:
    """The state of a module beside its parameters and buffers, as it is now.

    Attributes:
        tensors: Tensors that are neither, by name: `table`, `tables.0`.

    Args:
        module: The module.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._ignored: set[str] = set()
        self._watched: list[_Watched] = []
        self._met: dict[int, Any] = {}  # keeps them alive, so that an id stays one object's
        self._visit("", module, 0)

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """What is not what it was: by name, the values before and now."""
        return {k: v for watched in self._watched for k, v in watched.changed(self._ignored).items()}

    def leave_out(self, names: Collection[str]) -> None:
        """Compare nothing of these names (see `changed`) from now on."""
        self._ignored.update(names)
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not _is_in(name, names)}

    def looks(self) -> list[Callable[[], bool]]:
        """Per object a function that tells whether it has changed."""
        return [functools.partial(watched.differs, self._ignored) for watched in self._watched]

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._met:
            return
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value
            return
        self._met[id(value)] = value
        if isinstance(value, torch.nn.Module):
            self._watched.append(_Watched(name, vars(value), *(vars(value)[table] for table in _TABLES), hooks=2))
            own = {key: attribute for key, attribute in vars(value).items() if key not in _OF_TORCH}
            self._visit_all(name, {**own, **value._modules}, 0)
        elif isinstance(value, (tuple, *_CONTAINERS)):
            if not isinstance(value, tuple):
                self._watched.append(_Watched(name, value if len(value) <= _LARGE else _Length(value), elements=True))
            if len(value) <= _LARGE:
                self._visit_all(name, _as_dict(value), depth + 1)
        elif hasattr(value, "__dict__") and (dataclasses.is_dataclass(value) or _is_plain(value, 0)):
            self._watched.append(_Watched(name, vars(value)))
            self._visit_all(name, vars(value), depth + 1)

    def _visit_all(self, name: str, values: Mapping[Any, Any], depth: int) -> None:
        for key, value in list(values.items()) if depth <= _DEPTH else ():
            self._visit(f"{name}.{key}" if name else str(key), value, depth)


class _Length:
    """In the place of a large container: only how many elements it has."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __eq__(self, other: object) -> bool:
        return len(self._container) == other

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._container)


def _copied(live: Any) -> Any:
    if isinstance(live, _Length):
        return len(live)
    # a plain one, whatever classes derive from it; a table of some other kind (torch.jit's) is compared by identity
    kind = next((kind for kind in _CONTAINERS if isinstance(live, kind)), None)
    return live if kind is None else kind(live)


def _as_dict(container: Any) -> Mapping[Any, Any]:
    if isinstance(container, Mapping):
        return container
    if isinstance(container, (list, tuple)):
        return dict(enumerate(container))
    if isinstance(container, (set, frozenset)):
        return dict.fromkeys(container)
    return {"length": container if isinstance(container, int) else len(container)}


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _ATOMS) and bool(a == b))


def _is_in(name: str, ignored: Collection[str]) -> bool:
    return name in ignored or any(name.startswith(f"{one}.") for one in ignored)


def _is_plain(value: Any, depth: int) -> bool:
    """Whether an object is made of numbers, texts and the like all through, as a configuration is.

    Other objects (a trainer, a tokenizer, a connection) change for reasons of their own.
    """
    if isinstance(value, _ATOMS):
        return True
    if depth > _DEPTH or isinstance(value, _OPAQUE):
        return False
    if isinstance(value, dict):
        return len(value) > _LARGE or all(_is_plain(element, depth + 1) for element in value.values())
    if isinstance(value, (list, tuple, set)):
        return len(value) > _LARGE or all(_is_plain(element, depth + 1) for element in value)
    return hasattr(value, "__dict__") and all(_is_plain(element, depth + 1) for element in vars(value).values())
