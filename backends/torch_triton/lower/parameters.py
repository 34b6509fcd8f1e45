"""Weights as parameters and buffers under their own names, in the memory that they are in."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Graph

from xform.backends.torch_triton.lower.dtypes import TORCH_DTYPES, Precision
from xform.backends.torch_triton.lower.site import Unsupported
from xform.graph.values import Array

_EXTENSIONS = {
    torch_type: onnx_type for onnx_type, torch_type in TORCH_DTYPES.items() if onnx_type.numpy().isbuiltin != 1
}
_NAMES = {
    onnx_type.numpy().name: str(torch_type).removeprefix("torch.") for torch_type, onnx_type in _EXTENSIONS.items()
}


def tensor_of(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A constant as a torch tensor, in its own memory where it has one.

    Raises:
        Unsupported: torch has no such dtype.
    """
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise Unsupported(f"torch has no {tensor.dtype.name.lower()}")
    return torch_of(np.asarray(tensor.numpy()), dtype)


def torch_of(array: Array, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array as a tensor in the same memory; types that NumPy lacks (ml_dtypes) cross as their bits.

    Args:
        dtype: The torch dtype that the bits stand for; found by name if not given.
    """
    if array.dtype.name in _NAMES:
        dtype = dtype or getattr(torch, _NAMES[array.dtype.name])
        array = array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize])
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.array(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # memory-mapped files are read-only, and nothing writes into a frozen parameter
        warnings.simplefilter("ignore")
        made = torch.from_numpy(array)
    return made if dtype is None or made.dtype is dtype else made.view(dtype)


def array_of(tensor: torch.Tensor) -> Array:
    """A tensor as an array; bfloat16 and float8 as arrays of the ml_dtypes types."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype in _EXTENSIONS:
        bits = tensor.contiguous().view(torch.uint8 if tensor.itemsize == 1 else torch.int16).numpy()
        return bits.view(_EXTENSIONS[tensor.dtype].numpy())
    return tensor.numpy()


def register(root: torch.nn.Module, name: str, tensor: torch.Tensor, *, trainable: bool) -> str:
    """Register a tensor under `name`, whose dots are nested modules; the name that it got."""
    module = root
    *path, leaf = name.split(".") if all(name.split(".")) else [name.replace(".", "_")]
    taken: list[str] = []
    for part in path:
        while part in module._parameters or part in module._buffers or _is_attribute(module, part):
            part += "_"
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        taken.append(part)
        child = module._modules[part]
        assert child is not None
        module = child
    while (
        leaf in module._parameters or leaf in module._buffers or leaf in module._modules or _is_attribute(module, leaf)
    ):
        leaf += "_"
    if trainable:
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(leaf, tensor)
    return ".".join([*taken, leaf])


def _is_attribute(module: torch.nn.Module, name: str) -> bool:
    return name not in module._modules and hasattr(module, name) and name not in (*module._parameters, *module._buffers)


class Registry:
    """Registers each initializer once in each module that reads it."""

    def __init__(self, root: torch.nn.Module, precision: Precision) -> None:
        self._root = root
        self._precision = precision
        self._targets: dict[tuple[ir.Value, int, bool], str] = {}
        self._converted: dict[int, torch.Tensor] = {}

    def of(self, value: ir.Value, root: torch.nn.Module, *, as_is: bool = False) -> str:
        """The name under which an initializer is registered in `root`; `as_is` in its own dtype."""
        key = (value, id(root), as_is)
        if key not in self._targets:
            assert value.const_value is not None
            held = value.const_value
            tensor = tensor_of(held) if as_is else self._convert(held, value.dtype or held.dtype)
            trainable = tensor.is_floating_point() and tensor.ndim > 0
            self._targets[key] = register(root, value.name or "constant", tensor, trainable=trainable)
        return self._targets[key]

    def _convert(self, constant: ir.TensorProtocol, dtype: ir.DataType) -> torch.Tensor:
        tensor = tensor_of(constant)
        wanted = self._precision.of(dtype)
        if wanted is None or tensor.dtype is wanted:
            return tensor
        if (
            wanted.is_floating_point
            and tensor.is_floating_point()
            and torch.finfo(wanted).max < torch.finfo(tensor.dtype).max
        ):
            limits = torch.finfo(wanted)  # a mask's most negative float32 must not become an infinity
            infinite = torch.isinf(tensor)
            tensor = torch.where(infinite, tensor, tensor.clamp(limits.min, limits.max))
        return tensor.to(wanted)


def drop_unused(root: torch.nn.Module, graph: Graph) -> None:
    """Removes what dead code alone had read, so that the state is that of the graph."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for prefix, module in list(root.named_modules()):
        if any(name == prefix or prefix.startswith(f"{name}.") for name in read if name):
            continue  # inside a body
        for held in (module._parameters, module._buffers):
            for leaf in list(held):
                if (f"{prefix}.{leaf}" if prefix else leaf) not in read:
                    del held[leaf]
