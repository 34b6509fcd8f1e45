"""External data: weights in files beside the model. Checked at capture, mapped when read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
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

    def size_of(self, location: str, name: str) -> int:
        """Bytes in the data file `location`; refuses a location outside the folder."""
        if location not in self.sizes:
            self.sizes[location] = self._checked_size(location, name)
        return self.sizes[location]

    def _checked_size(self, location: str, name: str) -> int:
        where = f"initializer '{name}', location '{location}'"
        hint = "put the data file in the model's folder and name it there"
        if not location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute():
            raise ModelError("an external data path is empty or absolute", where=where, hint=hint)
        if ".." in PurePosixPath(location).parts or ".." in PureWindowsPath(location).parts:
            raise ModelError("an external data path leaves the model's folder", where=where, hint=hint)
        if "\0" in location:
            raise ModelError("an external data path has a null character", where=repr(location))
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


def check_external(tensors: Iterable[onnx.TensorProto], folder: Path | None) -> None:
    """Refuse external tensors whose file is missing, too short, or outside the model's folder. Reads no data.

    Args:
        folder: The folder of the model file; None where the model did not come from a file.

    Raises:
        ModelError: Names the initializer and its file.
    """
    checked = Folder(folder) if folder is not None else None
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if checked is None:
            raise ModelError(
                "the model keeps weights in a second file, but was not given as a file",
                where=f"initializer '{tensor.name}'",
                hint="give the path of the .onnx file, or load the data first (onnx.load_external_data_for_model)",
            )
        _check_range(tensor, checked)


def _check_range(tensor: onnx.TensorProto, folder: Folder) -> None:
    where = f"initializer '{tensor.name}'"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise ModelError("external data offset or length is not a number", where=where) from error
    needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
    if offset < 0 or (length is not None and length != needed):
        raise ModelError(f"external data of {length} bytes at offset {offset}; the shape needs {needed}", where=where)
    size = folder.size_of(entries.get("location", ""), tensor.name)
    if offset + needed > size:
        raise ModelError(
            f"an external data file is too short: {size} bytes, {offset + needed} are needed",
            where=f"{where}, location '{entries.get('location', '')}'",
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
