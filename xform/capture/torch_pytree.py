"""Trees of arguments and results: which classes can be taken apart, and what each tensor in them is called.

torch's own pytree does the work. Classes that it does not know, but that models take and return all the same (the
key/value caches of transformers, plain dataclasses), are registered here when the first one is met: an object becomes
its attributes, those that can hold tensors as children and the rest as context.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CACHE_MODULE = "transformers.cache_utils"
_REGISTERING = threading.Lock()


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a parameter or buffer of a lazy module has no values yet."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def is_same_value(a: Any, b: Any) -> bool:
    """Whether two plain values are one: of one type and equal, -0.0 another number than 0.0, NaN the same as NaN."""
    if type(a) is not type(b):
        return False
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """What is left of an object when its children are taken out: its class and its other attributes."""

    cls: type
    children: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _State) or (self.cls, self.children) != (other.cls, other.children):
            return False
        pairs = zip(self.constants, other.constants, strict=False)
        return len(self.constants) == len(other.constants) and all(
            a == b and is_same_value(x, y) for (a, x), (b, y) in pairs
        )

    def __hash__(self) -> int:
        return hash((self.cls, self.children))


def is_cache(cls: type) -> bool:
    """Whether a class is a key/value cache of transformers."""
    return any(base.__module__ == _CACHE_MODULE for base in cls.__mro__)


def caches(tree: Any) -> list[Any]:
    """The outermost caches in a tree, in order."""
    leaves = pytree.tree_leaves(tree, is_leaf=lambda value: is_cache(type(value)))
    return [leaf for leaf in leaves if is_cache(type(leaf))]


def write_back(tree: Any, targets: Mapping[int, Any]) -> Any:
    """The tree with some of its outermost caches, by index, written into other objects that take their places."""
    leaves, spec = pytree.tree_flatten(tree, is_leaf=lambda value: is_cache(type(value)))
    places = [place for place, leaf in enumerate(leaves) if is_cache(type(leaf))]
    for index, target in targets.items():
        target.__dict__.clear()
        target.__dict__.update(leaves[places[index]].__dict__)
        leaves[places[index]] = target
    return pytree.tree_unflatten(leaves, spec)


def _can_hold_tensors(value: object) -> bool:
    return isinstance(value, (torch.Tensor, *_SYMBOLIC, list, tuple, dict)) or is_cache(type(value))


def _flatten_state(value: object) -> tuple[list[Any], _State]:
    children = {name: child for name, child in vars(value).items() if _can_hold_tensors(child)}
    constants = tuple((name, child) for name, child in vars(value).items() if name not in children)
    return list(children.values()), _State(type(value), tuple(children), constants)


def _flatten_state_with_keys(value: object) -> tuple[list[tuple[Any, Any]], _State]:
    children, state = _flatten_state(value)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(state.children, children, strict=True)], state


def _unflatten_state(children: Iterable[Any], state: _State) -> Any:
    value: Any = object.__new__(state.cls)
    value.__dict__.update(state.constants)
    value.__dict__.update(zip(state.children, children, strict=True))
    return value


def register_classes(tree: Any) -> None:
    """Register with torch's pytree every cache and dataclass in `tree` that it does not know yet."""
    while True:
        unknown = {
            type(leaf)
            for leaf in pytree.tree_leaves(tree)
            if not isinstance(leaf, (torch.Tensor, *PLAIN, *_SYMBOLIC))
            and type(leaf) not in pytree.SUPPORTED_NODES
            and hasattr(leaf, "__dict__")
            and (is_cache(type(leaf)) or dataclasses.is_dataclass(leaf))
        }
        if not unknown:
            return
        with _REGISTERING:
            for cls in unknown - pytree.SUPPORTED_NODES.keys():  # another thread may have met it too
                pytree.register_pytree_node(
                    cls, _flatten_state, _unflatten_state, flatten_with_keys_fn=_flatten_state_with_keys
                )


def flatten(tree: Any, leaf: type | tuple[type, ...] = ()) -> tuple[list[tuple[tuple[Any, ...], Any]], pytree.TreeSpec]:
    """The leaves of a tree with their key paths, and the structure that puts them together again.

    Args:
        tree: Anything.
        leaf: Classes that are not to be taken apart.
    """
    register_classes(tree)
    return pytree.tree_flatten_with_path(tree, is_leaf=lambda value: isinstance(value, leaf))


def unflatten(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The tree of this structure with these leaves."""
    return pytree.tree_unflatten(leaves, spec)


def _step(key: Hashable) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f"_{key.idx}"
    if isinstance(key, pytree.MappingKey):
        return f"_{key.key}" if isinstance(key.key, int) else f".{key.key}"
    if isinstance(key, pytree.GetAttrKey):
        return f".{key.name}"
    return f".{key}"


def path_name(path: Sequence[Any], root: str = "") -> str:
    """The name of a leaf: `mask`, `images_0`, `features.low`, `past_key_values.layers_0.keys`.

    Args:
        root: Name of the whole tree, put before paths that start with a number.
    """
    text = "".join(_step(key) for key in path)
    if text.startswith("."):
        return (text[1:] or root) if root in ("", "output") else root + text
    return root + text if root else text.lstrip("_")
