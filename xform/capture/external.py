"""External data: weights in files beside the model. Checked at capture, mapped when read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from xform.errors import ModelError


@dataclass
class Folder:
    """The folder of a model, with the sizes of the data files in it that were already checked."""

    path: Path
    sizes: dict[str, int] = field(default_factory=dict)

    def size_of(self, location: str, place: str) -> int:
        """Bytes in the data file `location`; refuses a location outside the folder.

        Args:
            place: Which tensor names it, for the error.
        """
        if location not in self.sizes:
            self.sizes[location] = self._checked_size(location, place)
        return self.sizes[location]

    def _checked_size(self, location: str, place: str) -> int:
        where = f"{place}, location '{location}'"
        hint = "put the data file in the model's folder and name it there"
        if not location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute():
            raise ModelError("an external data path is empty or absolute", where=where, hint=hint)
        if ".." in PurePosixPath(location).parts or ".." in PureWindowsPath(location).parts:
            raise ModelError("an external data path leaves the model's folder", where=where, hint=hint)
        if "\0" in location:
            raise ModelError("an external data path has a null character", where=where)
        folder, target = os.path.realpath(self.path), os.path.realpath(self.path / location)
        if os.path.commonpath([folder, target]) != folder:
            raise ModelError(
                f"an external data file is a link that leaves the model's folder: {target}",
                where=where,
                hint="copy the model with its data files into one folder (cp -L follows the links)",
            )
        return _file_size(Path(target), where)


def _file_size(path: Path, where: str) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(
            f"an external data file cannot be read: {error.strerror}",
            where=where,
            hint="the weights of this model lie in a second file; put it beside the .onnx file",
        ) from error
    if not path.is_file() or not os.access(path, os.R_OK):
        raise ModelError("an external data file is not a readable file", where=where)
    if status.st_nlink > 1:
        raise ModelError(
            "an external data file has a second name (hard link), which could lead out of the model's folder",
            where=where,
            hint="make it a file of its own: cp FILE COPY && mv COPY FILE",
        )
    return status.st_size


def check_external(tensors: Iterable[tuple[onnx.TensorProto, str]], folder: Path | None) -> None:
    """Refuse external tensors whose file is missing, too short, or outside the model's folder. Reads no data.

    Args:
        tensors: Every tensor of the model, with a word on where it lies (`xform.capture.walk.tensors`).
        folder: The folder of the model file; None where the model did not come from a file.

    Raises:
        ModelError: Names the tensor and its file.
    """
    checked = Folder(folder) if folder is not None else None
    for tensor, place in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if checked is None:
            raise ModelError(
                "the model keeps weights in a second file, but was not given as a file",
                where=place,
                hint="give the path of the .onnx file, or load the data first (onnx.load_external_data_for_model)",
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) < len(tensor.external_data):
            keys = [entry.key for entry in tensor.external_data]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ModelError(f"external data gives its {twice!r} twice: readers would disagree", where=place)
        _check_range(
            entries.get("location", ""),
            _whole_number(entries.get("offset", "0"), place),
            _whole_number(entries["length"], place) if "length" in entries else None,
            _needed(tensor.dims, tensor.data_type),
            checked,
            place,
        )


def check_external_ir(model: ir.Model) -> None:
    """The same for a model that was read by onnx_ir, whose external tensors know their folders.

    Raises:
        ModelError: Names the tensor and its file.
    """
    folders: dict[str, Folder] = {}
    for tensor, place in _ir_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            base = os.fspath(tensor.base_dir) or "."
            folder = folders.setdefault(base, Folder(Path(base)))
            needed = _needed(tensor.shape.numpy(), tensor.dtype.value)
            _check_range(os.fspath(tensor.location), tensor.offset or 0, tensor.length, needed, folder, place)


def _ir_tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, str]]:
    for graph in (*model.graphs(), *(f.graph for f in model.functions.values())):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield value.const_value, f"initializer '{name}'"
        for node in graph:
            for attr in node.attributes.values():
                if not attr.is_ref() and attr.type is ir.AttributeType.TENSOR:
                    yield attr.as_tensor(), f"attribute '{attr.name}' of {node.name} ({node.op_type})"
                elif not attr.is_ref() and attr.type is ir.AttributeType.TENSORS:
                    yield from ((t, f"attribute '{attr.name}' of {node.name}") for t in attr.as_tensors())
    for function in model.functions.values():
        for attr in function.attributes.values():
            if attr.value is not None and attr.type is ir.AttributeType.TENSOR:
                yield attr.as_tensor(), f"attribute '{attr.name}' of function {function.name}"


def _whole_number(text: str, place: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ModelError("external data offset or length is not a number", where=place)
    return int(text)


def _needed(dims: Iterable[int], data_type: int) -> int:
    """Bytes of a tensor of that shape and type."""
    return math.ceil(math.prod(dims) * ir.DataType(data_type).bitwidth / 8)


def _check_range(location: str, offset: int, length: int | None, needed: int, folder: Folder, place: str) -> None:
    if offset < 0 or (length is not None and length != needed):
        raise ModelError(f"external data of {length} bytes at offset {offset}; the shape needs {needed}", where=place)
    size = folder.size_of(location, place)
    if offset + needed > size:
        raise ModelError(
            f"an external data file is too short: {size} bytes, {offset + needed} are needed",
            where=f"{place}, location '{location}'",
            hint="the file is truncated; download or export it again",
        )


def data_files(tensors: Iterable[onnx.TensorProto], folder: Path) -> list[Path]:
    """The data files that tensors point to, each once; nothing is checked or opened."""
    locations = {
        entry.value
        for tensor in tensors
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location" and entry.value and "\0" not in entry.value
    }
    return [folder / location for location in sorted(locations)]
