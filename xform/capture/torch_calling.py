"""The calling convention of a captured module: which graph input is which argument, and what a result looks like."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from xform.capture.torch_pytree import (
    PLAIN,
    caches,
    flatten,
    is_same_value,
    path_name,
    register_classes,
    unflatten,
    write_back,
)
from xform.errors import UsageError

_OMITTED = (bool, int, float, str, type(None))


_LEAVES = (torch.Tensor, *PLAIN, torch.dtype, torch.device, torch.Size)


@functools.lru_cache(maxsize=256)
def _flat(names: tuple[str, ...]) -> pytree.TreeSpec:
    """The structure of a dict of leaves."""
    return pytree.tree_structure(dict.fromkeys(names, 0))


Autocast = tuple[str, ...]  # per kind of device, the dtype that autocast computes in; empty where it is off


def autocast_now() -> Autocast:
    """What torch.autocast does in this thread at this moment: what a module computes depends on it."""
    if not torch._C._is_any_autocast_enabled():  # private, but much cheaper than asking for each kind of device
        return ()
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple([f"{kind} {torch.get_autocast_dtype(kind)}" for kind in kinds])


def unique_names(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """The names in order, each made unique by a number where it is used already."""
    used = set(taken)
    result = []
    for name in names:
        candidate, count = name, 1
        while candidate in used:
            candidate, count = f"{name}_{count}", count + 1
        used.add(candidate)
        result.append(candidate)
    return result


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of one call, taken apart.

    Attributes:
        tensors: Tensors by graph input name, in order.
        constants: Other leaves (numbers, strings, None) by name.
        spec: The structure that holds them.
    """

    tensors: dict[str, torch.Tensor]
    constants: dict[str, Any]
    spec: pytree.TreeSpec
    order: tuple[str, ...]

    def tree(self, tensors: Sequence[Any]) -> Any:
        """The bound arguments with other tensors in the places of these."""
        values = {**self.constants, **dict(zip(self.tensors, tensors, strict=True))}
        return unflatten([values[name] for name in self.order], self.spec)

    def apart(self, taken: Iterable[torch.Tensor]) -> tuple[Arguments, tuple[str, ...]]:
        """The same arguments in memory of their own, and the names of those that were copied for that.

        torch.export takes one tensor in two places for one input, and an argument that is a parameter for that
        parameter. But what is one tensor in an example call is another one in the next.

        Args:
            taken: Tensors whose memory no argument may share: the module's.
        """
        used = {_memory(tensor) for tensor in taken}
        tensors: dict[str, torch.Tensor] = {}
        copied = []
        for name, tensor in self.tensors.items():
            if _memory(tensor) in used:
                tensor = tensor.detach().clone()
                copied.append(name)
            used.add(_memory(tensor))
            tensors[name] = tensor
        return dataclasses.replace(self, tensors=tensors), tuple(copied)


def _memory(tensor: torch.Tensor) -> object:
    """What tells whether two tensors share memory: their storage, or the tensor itself where it has none."""
    if tensor.layout is not torch.strided or tensor.is_meta or (pointer := tensor.untyped_storage().data_ptr()) == 0:
        return id(tensor)
    return tensor.device, pointer


@dataclasses.dataclass(frozen=True)
class Signature:
    """How calls of a module are bound: equal calls spelled differently (by position, by name) become one form."""

    signature: inspect.Signature

    @staticmethod
    def of(module: torch.nn.Module) -> Signature:
        """The signature of a module's forward."""
        return Signature(inspect.signature(module.forward))

    @staticmethod
    def of_program(program: ExportedProgram, module: torch.nn.Module) -> Signature:
        """The signature of an exported program's module, which takes arguments exactly as they were exported."""
        positional, keywords = program.call_spec.in_spec.children()
        names = list(inspect.signature(module.forward).parameters)[: positional.num_children]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords.context]
        return Signature(inspect.Signature(parameters))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter, in the order of the signature, without those that only repeat a plain default.

        Raises:
            UsageError: The call does not fit the signature.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(
                f"these arguments do not fit the module's forward{self.signature}: {error}",
                hint="give the inputs as they are given to the module",
            ) from error
        parameters = self.signature.parameters
        arguments = {}
        for name, value in bound.arguments.items():
            default = parameters[name].default
            if isinstance(value, _OMITTED) and is_same_value(value, default):
                continue
            if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                value = dict(sorted(value.items()))
            arguments[name] = value
        return arguments

    def call_form(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs` of a call with these bound arguments."""
        kinds = {name: parameter.kind for name, parameter in self.signature.parameters.items()}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        by_position = True
        for name, kind in kinds.items():
            if name not in arguments:
                # A parameter left out: what follows can only be given by name.
                by_position = by_position and kind is inspect.Parameter.VAR_POSITIONAL
                continue
            value = arguments[name]
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif by_position and kind is not inspect.Parameter.KEYWORD_ONLY:
                args.append(value)
            else:
                kwargs[name] = value
        return tuple(args), kwargs

    def _leaf_name(self, path: Sequence[Any]) -> str:
        parameter = self.signature.parameters[path[0].key]
        # Extra keywords are known by their own name, not by the name of the catch-all parameter.
        return path_name(path[1:] if parameter.kind is inspect.Parameter.VAR_KEYWORD else path)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Take one call apart.

        Raises:
            UsageError: The call does not fit the signature, or an argument is neither tensor nor plain value.
        """
        bound = self.bind(args, kwargs)
        if all(isinstance(value, _LEAVES) for value in bound.values()):  # as most calls are; pytree is slow
            names = tuple(bound)
            tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
            constants = {name: value for name, value in bound.items() if name not in tensors}
            return Arguments(tensors, constants, _flat(names), names)
        return self._flatten_tree(bound)

    def _flatten_tree(self, bound: Mapping[str, Any]) -> Arguments:
        leaves, spec = flatten(bound, torch.Size)  # put together again it would be a tuple
        names = unique_names([self._leaf_name(path) for path, _ in leaves])
        tensors: dict[str, torch.Tensor] = {}
        constants: dict[str, Any] = {}
        for name, (_, leaf) in zip(names, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                tensors[name] = leaf
            elif isinstance(leaf, _LEAVES):
                constants[name] = leaf
            elif type(leaf).__module__ == "numpy":
                raise UsageError(
                    f"argument {name} is a NumPy {type(leaf).__name__}, and a torch module takes tensors",
                    hint=f"convert it: torch.as_tensor({name})",
                )
            else:
                raise UsageError(
                    f"argument {name} is a {type(leaf).__name__}, which cannot be taken apart into tensors",
                    hint="pass tensors in tuples, lists, dicts or dataclasses, or register the class with "
                    "torch.utils._pytree.register_pytree_node",
                )
        return Arguments(tensors, constants, spec, tuple(names))


@dataclasses.dataclass
class Results:
    """How a module's result is put together from graph outputs.

    A result leaf is a graph output (several leaves may be one tensor, and so one output), or a constant.

    Attributes:
        spec: Structure of the result.
        sources: Per leaf, the index of its graph output, or None for a constant.
        constants: Per leaf, its value where it is a constant.
        names: Name per graph output.
        integers: Graph outputs that are a Python int in the original's result (a size, say).
        complex: Graph outputs that are complex in the original's result; the graph gives a last dim of 2.
        written: Caches in the result that are caches among the arguments, by index in each: forward writes into them.
    """

    spec: pytree.TreeSpec
    sources: list[int | None]
    constants: list[Any]
    names: list[str]
    integers: frozenset[int]
    complex: frozenset[int]
    written: dict[int, int]

    @staticmethod
    def of(result: Any, arguments: Any = None) -> tuple[list[Any], Results]:
        """Take a result apart into the distinct leaves that depend on inputs, and how to put it together again.

        Args:
            result: What the module returned.
            arguments: What it was called with.

        Raises:
            UsageError: A leaf is neither a tensor nor a plain value.
        """
        register_classes(result)
        leaves, spec = flatten(result)
        sources: list[int | None] = []
        constants: list[Any] = []
        names: list[str] = []
        tensors: list[Any] = []
        integers: set[int] = set()
        complexes: set[int] = set()
        for path, leaf in leaves:
            computed = isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))
            constants.append(None if computed else leaf)
            if not computed:
                if not isinstance(leaf, (*PLAIN, torch.dtype, torch.device)):
                    raise UsageError(
                        f"the module returns a {type(leaf).__name__}, which cannot be taken apart into tensors",
                        hint="register the class with torch.utils._pytree.register_pytree_node",
                    )
                sources.append(None)
                continue
            index = next((i for i, known in enumerate(tensors) if known is leaf), None)
            if index is None:
                index = len(tensors)
                tensors.append(leaf)
                names.append(path_name(path, "output"))
                if not isinstance(leaf, torch.Tensor):
                    integers.add(index)
                elif leaf.is_complex():
                    complexes.add(index)
            sources.append(index)
        given = caches(arguments)
        written = {
            place: index
            for place, cache in enumerate(caches(result))
            for index, argument in enumerate(given)
            if argument is cache
        }
        kinds = (frozenset(integers), frozenset(complexes))
        return tensors, Results(spec, sources, constants, unique_names(names), *kinds, written)

    def settled(self, values: Mapping[int, Any]) -> Results:
        """The same with these outputs, by index, settled as constants: the export found that they do not vary."""
        kept = [index for index in range(len(self.names)) if index not in values]
        renumbered = {old: new for new, old in enumerate(kept)}
        return dataclasses.replace(
            self,
            sources=[renumbered.get(source) if source is not None else None for source in self.sources],
            constants=[
                values.get(source, constant) if source is not None else constant
                for source, constant in zip(self.sources, self.constants, strict=True)
            ],
            names=[self.names[index] for index in kept],
            integers=frozenset(renumbered[index] for index in self.integers if index in renumbered),
            complex=frozenset(renumbered[index] for index in self.complex if index in renumbered),
        )

    def leaves(self, result: Any) -> list[Any]:
        """What each graph output stands for in a result of the module."""
        leaves, _ = flatten(result)
        chosen: dict[int, Any] = {}
        for source, (_, leaf) in zip(self.sources, leaves, strict=True):
            if source is not None:
                chosen.setdefault(source, leaf)
        return [chosen[index] for index in range(len(self.names))]

    def build(self, outputs: Sequence[torch.Tensor], arguments: Any = None) -> Any:
        """The result in the module's own structure and classes from the graph's outputs.

        Args:
            outputs: One tensor per graph output, in order.
            arguments: What the call was made with; caches that forward writes into are written and returned.

        Raises:
            UsageError: Not one tensor for every graph output.
        """
        if len(outputs) != len(self.names):
            raise UsageError(f"expected {len(self.names)} outputs ({', '.join(self.names)}), got {len(outputs)}")
        values = [
            output.item()
            if index in self.integers
            else torch.view_as_complex(output)
            if index in self.complex
            else output
            for index, output in enumerate(outputs)
        ]
        leaves = [
            constant if source is None else values[source]
            for source, constant in zip(self.sources, self.constants, strict=True)
        ]
        result = unflatten(leaves, self.spec)
        given = caches(arguments)
        return write_back(result, {place: given[index] for place, index in self.written.items()}) if given else result
