"""Weights and graph in one `.safetensors` file: nothing in it is executed when it is read.

The tensors have their names in the graph. The graph without its weights, an ONNX protobuf, is in the file's metadata in
base64 (metadata of safetensors are strings); a weight that is left out of it refers to the tensor of its name.
"""

from __future__ import annotations

import base64
from pathlib import Path

import onnx
import onnx_ir as ir

from xform.backends.torch_triton.lower.parameters import tensor_of
from xform.errors import ModelError, OutputError
from xform.graph.atomic import Staged, output_error, remove_leftovers, resolve

_FORMAT = "xform.graph/1"
_LOCATION = "safetensors"
_OUTSIDE_FROM_BYTES = 1024


def save_state(model: ir.Model, path: Path) -> list[Path]:
    """Write a graph with its weights.

    Raises:
        OutputError: It cannot be written, or safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise OutputError("safetensors is not installed", hint="pip install safetensors") from error
    target = resolve(path)
    tensors, kept = {}, []
    try:
        for name, value in model.graph.initializers.items():
            held = value.const_value
            if held is None or held.nbytes < _OUTSIDE_FROM_BYTES or held.dtype is ir.DataType.STRING:
                continue
            tensors[name] = tensor_of(held).contiguous().clone()  # tied weights are written once for each name
            kept.append((value, held))
            shape = ir.Shape(held.shape.numpy())
            value.const_value = ir.ExternalTensor(_LOCATION, 0, held.nbytes, held.dtype, shape=shape, name=name)
        graph = ir.to_proto(model).SerializeToString()
    finally:
        for value, held in kept:
            value.const_value = held
    data = save(tensors, {"format": _FORMAT, "graph": base64.b64encode(graph).decode()})
    try:
        remove_leftovers(target)
        with Staged(target) as staged:
            staged.file.write(data)
            staged.finish()
            staged.commit(target)
    except OSError as error:
        raise output_error(error, target) from error
    return [target]


def load_state(path: Path) -> ir.Model:
    """Read what `save_state` wrote; weights are mapped from the file, not copied.

    Raises:
        ModelError: It is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ModelError("the file holds no xform graph", where=str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        proto = onnx.ModelProto.FromString(base64.b64decode(metadata["graph"], validate=True))
        model: ir.Model = ir.from_proto(proto)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"the file cannot be read: {error}", where=str(path)) from error
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            if name not in tensors:
                raise ModelError(f"the weight {name!r} is missing", where=str(path))
            value.const_value = ir.tensor_adapters.TorchTensor(tensors[name], name=name)
    return model
