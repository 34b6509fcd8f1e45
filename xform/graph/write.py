"""Writing a model: streamed, atomic, never over its own input.

Weights go from where they are to the file one at a time, so memory stays bounded by the largest one. A file appears
under its final name only when it is complete; a run that is killed leaves at most a hidden `.NAME.PID.xform-tmp`, which
the next save of the same name removes.

A model over the size limit of a protobuf keeps its weights in `NAME.data` beside it. An existing data file is never
overwritten, because the model that points to it would be broken until its own replacement: the new one gets a
free name (`NAME.1.data`), the model is replaced, and then the data file that the old model pointed to is removed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.serde import serialize_model

from xform.errors import ModelError, OutputError, UsageError
from xform.graph.atomic import Staged, data_names, locked, output_error, refuse_overwriting, remove_leftovers, resolve

SOURCE_PATH = "xform.source_path"  # key in model.meta: the file that the model was read from
SOURCE_DATA = "xform.source_data"  # key in model.meta: the data files that it points to, also those not needed any more
INLINE_LIMIT = 1_900_000_000  # bytes of weights in the model file itself; a protobuf ends at 2 GiB
STREAMED = 1024  # bytes from which on a tensor is streamed, or external; smaller ones are part of the graph
_ALIGN, _ALIGN_LARGE, _LARGE = 64, 4096, 1 << 20


@dataclass(frozen=True)
class _Weight:
    """A large initializer taken out of the graph: its value, its tensor, and where it lies in the data file."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def save(model: ir.Model, path: str | os.PathLike[str], *, external_data: bool | None = None) -> list[Path]:
    """Write `model` to `path`, and its weights to a second file where asked or too large for one.

    Args:
        external_data: True: weights in a file of their own. None: only if they exceed 1.9 GB.

    Returns:
        The files written, the model first.

    Raises:
        OutputError: The target cannot be written: no folder, no rights, a full disk. Nothing is left behind.
        UsageError: The target is the file that the model was read from, or one that its weights are read from; or the
            weights do not fit into one file.
        ModelError: The weights could not be read.
    """
    target = resolve(Path(path))
    refuse_overwriting([target], sources(model))
    weights = _weights(model)
    size = sum(weight.tensor.nbytes for weight in weights)
    if external_data is None:
        external_data = size > INLINE_LIMIT
    elif not external_data and size > INLINE_LIMIT:
        raise UsageError(f"{size} bytes of weights do not fit into one file", hint="allow external data")
    try:
        remove_leftovers(target)
        if external_data and weights:
            return _save_external(model, target, weights)
        return _save_inline(model, target, weights)
    except OSError as error:
        raise _read_or_write_error(error, target, weights) from error


def to_bytes(model: ir.Model) -> bytes:
    """The model as one protobuf.

    Raises:
        UsageError: The weights exceed what a protobuf can hold.
    """
    weights = _weights(model)
    if sum(weight.tensor.nbytes for weight in weights) > INLINE_LIMIT:
        raise UsageError("the model is too large for one protobuf", hint="save it to a file, with external data")
    buffer = io.BytesIO()
    _write_inline(model, weights, buffer)
    return buffer.getvalue()


def skeleton(model: ir.Model, location: str = "weights") -> onnx.ModelProto:
    """The model's protobuf with its large initializers as references to the external file `location`.

    For whoever needs the graph without the weights (a checker, a fingerprint); nothing is loaded or written.
    """
    with _taken_out(model, _weights(model), location):
        return serialize_model(model)


def _weights(model: ir.Model) -> list[_Weight]:
    """The large initializers, with places in a data file; a tensor that several initializers share gets one place."""
    weights: list[_Weight] = []
    places: dict[object, int] = {}
    end = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < STREAMED:
                continue
            key = _identity(tensor)
            if key not in places:
                places[key] = _aligned(end, tensor.nbytes)
                end = places[key] + tensor.nbytes
            weights.append(_Weight(value, tensor, places[key]))
    return weights


def _identity(tensor: ir.TensorProtocol) -> object:
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset or 0, tensor.nbytes)
    return id(tensor)


def _aligned(offset: int, size: int) -> int:
    unit = _ALIGN_LARGE if size >= _LARGE else _ALIGN
    return (offset + unit - 1) // unit * unit


@contextlib.contextmanager
def _taken_out(model: ir.Model, weights: list[_Weight], location: str) -> Iterator[None]:
    """Let the large initializers be references into `location`, and small external ones be loaded, for a while."""
    before: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for weight in weights:
            before.append((weight.value, weight.tensor))
            weight.value.const_value = _reference(weight, location)
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < STREAMED:
                    before.append((value, tensor))
                    value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, shape=tensor.shape)
        yield
    finally:
        for value, tensor in before:
            value.const_value = tensor


def _reference(weight: _Weight, location: str) -> ir.ExternalTensor:
    tensor = weight.tensor
    return ir.ExternalTensor(
        location,
        weight.offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=weight.value.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _save_external(model: ir.Model, target: Path, weights: list[_Weight]) -> list[Path]:
    with Staged(target, ".data") as data:
        written: set[int] = set()
        for weight in weights:
            if weight.offset not in written:
                written.add(weight.offset)
                data.file.seek(weight.offset)
                _stream(weight, data.file)
        data.finish()
        with locked(target.parent):
            old, name = data_names(target)
            with _taken_out(model, weights, name):
                proto = serialize_model(model)
            with Staged(target) as graph:
                graph.file.write(proto.SerializeToString())
                graph.finish()
                data_path = target.with_name(name)
                data.commit(data_path)
                graph.commit(target)
            for stale in old:
                stale.unlink(missing_ok=True)
    return [target, data_path]


def _save_inline(model: ir.Model, target: Path, weights: list[_Weight]) -> list[Path]:
    with Staged(target) as staged:
        _write_inline(model, weights, staged.file)
        staged.finish()
        with locked(target.parent):
            old, _ = data_names(target)
            staged.commit(target)
            for stale in old:
                stale.unlink(missing_ok=True)
    return [target]


def _write_inline(model: ir.Model, weights: list[_Weight], file: BinaryIO) -> None:
    """Write one protobuf without ever building it: the graph first, then its weights field by field.

    Protobuf allows fields in any order, so `ModelProto.graph` comes last and its large initializers last in it.
    Large initializers of subgraphs are part of the graph.
    """
    own = [weight for weight in weights if weight.value.graph is model.graph]
    with _taken_out(model, own, "inline"):
        proto = serialize_model(model)
    names = {weight.value.name for weight in own}
    heads: dict[str, bytes] = {}
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            heads[tensor.name] = tensor.SerializeToString()
        else:
            kept.append(tensor)
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    proto.ClearField("graph")
    body = graph.SerializeToString()
    fields = [(w, heads[w.value.name or ""]) for w in own]
    length = len(body) + sum(_tensor_field_size(w, head) for w, head in fields)
    file.write(proto.SerializeToString())
    file.write(_tag(7) + _varint(length) + body)
    for weight, head in fields:
        raw = _tag(9) + _varint(weight.tensor.nbytes)
        file.write(_tag(5) + _varint(len(head) + len(raw) + weight.tensor.nbytes) + head + raw)
        _stream(weight, file)


def _tensor_field_size(weight: _Weight, head: bytes) -> int:
    inner = len(head) + 1 + len(_varint(weight.tensor.nbytes)) + weight.tensor.nbytes
    return 1 + len(_varint(inner)) + inner


def _tag(field: int) -> bytes:
    return bytes([field << 3 | 2])


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _stream(weight: _Weight, file: BinaryIO) -> None:
    start = file.tell()
    try:
        if isinstance(weight.tensor, ir.ExternalTensor):
            weight.tensor.tofile(file)  # file to file, in the kernel where it can
        else:
            file.write(_buffer(weight.tensor))
    except ValueError as error:
        raise ModelError(f"a weight could not be read: {error}", where=weight.value.name or "") from error
    if file.tell() - start != weight.tensor.nbytes:
        wrote = file.tell() - start
        raise RuntimeError(f"weight {weight.value.name} wrote {wrote} bytes instead of {weight.tensor.nbytes}")


def _buffer(tensor: ir.TensorProtocol) -> memoryview | bytes:
    """The stored bytes of a tensor; for a plain array that is its own memory, not a copy."""
    raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
    if isinstance(raw, np.ndarray) and raw.flags.c_contiguous and tensor.dtype.bitwidth >= 8 and raw.dtype.isnative:
        return raw.reshape(-1).view(np.uint8).data if sys.byteorder == "little" else tensor.tobytes()
    return tensor.tobytes()


def sources(model: ir.Model) -> set[Path]:
    """Files that the model is read from: its own, and those of its external weights."""
    files = {Path(model.meta[SOURCE_PATH])} if SOURCE_PATH in model.meta else set()
    return files | set(map(Path, model.meta.get(SOURCE_DATA, ()))) | weight_files(model)


def weight_files(model: ir.Model) -> set[Path]:
    """Files that initializers are read from when they are needed."""
    return {
        Path(value.const_value.path)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _read_or_write_error(error: OSError, target: Path, weights: list[_Weight]) -> Exception:
    read = {w.tensor.path for w in weights if isinstance(w.tensor, ir.ExternalTensor)}
    if error.errno is None or error.filename in read:
        return ModelError(f"the weights could not be read: {error}", hint="was the input moved or changed meanwhile?")
    return output_error(error, target)


__all__ = [
    "INLINE_LIMIT",
    "SOURCE_DATA",
    "SOURCE_PATH",
    "OutputError",
    "save",
    "skeleton",
    "sources",
    "to_bytes",
    "weight_files",
]
