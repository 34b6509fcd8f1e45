"""From a file or bytes to an ONNX protobuf, and a plain word about what the file is when it is something else."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from xform.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1  # bytes in one protobuf message, set by every reader of the format

_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model itself", "fetch the file: git lfs pull"),
    (0, b"\x89HDF", "an HDF5 (Keras) file", "convert it to ONNX with tf2onnx or keras.Model.export"),
    (4, b"TFL3", "a TensorFlow Lite file", "convert it to ONNX with tf2onnx --tflite"),
    (4, b"ORTM", "a model in ONNX Runtime's own format (.ort)", "give the .onnx file that it was made from"),
    (0, b"GGUF", "a GGUF file", "export the original model to ONNX"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip"),
    (0, b"\x80\x02", "a pickle (an old PyTorch checkpoint)", "load it in Python and give xform the module"),
    (0, b"\x80\x03", "a pickle", "load it in Python and give xform the module"),
    (0, b"\x80\x04", "a pickle", "load it in Python and give xform the module"),
    (0, b"<", "a text file (HTML or XML)", "download the model again; this may be an error page"),
)


def parse_file(path: Path) -> onnx.ModelProto:
    """Read the protobuf of an ONNX file; external weights stay where they are.

    Raises:
        ModelError: The file is missing, empty, truncated, too large for one protobuf, or not ONNX.
    """
    where = str(path)
    if path.is_dir():
        raise _folder_error(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError("the model path is a pipe or a device, not a file", where=where, hint=_COPY_HINT)
        # What is opened is what is looked at; a pipe would be waited for, and a device never ends.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelError("the model path is a pipe or a device, not a file", where=where, hint=_COPY_HINT)
            if status.st_size > PROTOBUF_LIMIT:
                size = f"{status.st_size} bytes; one protobuf holds at most 2 GB"
                what = identify(file.read(4096)) or (size, _EXTERNAL_HINT)
                raise ModelError(f"cannot read the model: the file is {what[0]}", where=where, hint=what[1])
            data = file.read(PROTOBUF_LIMIT)
    except FileNotFoundError as error:
        raise ModelError("there is no such model file", where=where, hint="check the path") from error
    except OSError as error:
        raise ModelError(f"cannot read the model file: {error.strerror}", where=where) from error
    return parse_bytes(data, where=where)


def parse_bytes(data: bytes, *, where: str = "bytes") -> onnx.ModelProto:
    """Parse serialized ONNX.

    Raises:
        ModelError: Empty, truncated, or not an ONNX model; says what it is where that can be told.
    """
    if not data:
        raise ModelError("the model file is empty (0 bytes)", where=where, hint="export or download it again")
    known = identify(data)
    if known is not None:
        raise ModelError(f"this is not an ONNX model but {known[0]}", where=where, hint=known[1])
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        missing = missing_bytes(data)
        if missing:
            raise ModelError(
                f"the model file is truncated: at least {missing} more bytes should follow its {len(data)}",
                where=where,
                hint="export or download it again",
            ) from error
        raise ModelError(
            "this is not an ONNX model: it does not parse as a protobuf",
            where=where,
            hint="the file is damaged, or of another format",
        ) from error
    if not proto.HasField("graph"):
        what = "not an ONNX model: a protobuf without a graph" if proto.ListFields() else "not an ONNX model"
        raise ModelError(f"this is {what}", where=where, hint="the file is truncated, or of another format")
    return proto


_COPY_HINT = "write the model to a file first, and give that"
_EXTERNAL_HINT = "save the weights as external data: onnx.save(model, path, save_as_external_data=True)"


def identify(data: bytes) -> tuple[str, str] | None:
    """What a file that is not ONNX is, and what to do; None if nothing is recognized."""
    for offset, magic, what, hint in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return what, hint
    if data[:4] == b"PK\x03\x04":
        return _identify_zip(data)
    if _is_safetensors(data):
        return "a safetensors file: weights without a graph", "load it into its model and give xform the module"
    head = data[:4096]
    if b"saved_model" in head or b"tensorflow" in head[:64].lower() or b"\x12\x0bPlaceholder" in head:
        return "a TensorFlow graph", "convert it to ONNX with tf2onnx"
    return None


def _identify_zip(data: bytes) -> tuple[str, str]:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile:
        return "a zip archive (truncated)", "download it again"
    ends = {name.rsplit("/", 1)[-1] for name in names}
    if "archive_format" in ends or "serialized_exported_program.json" in ends or any(n.endswith(".pt2") for n in names):
        return "a PyTorch exported program (.pt2)", "torch.export.load it and give xform the program"
    if "data.pkl" in ends and "constants.pkl" in ends:
        return "a TorchScript archive", "give xform the original module, or export that to ONNX"
    if "data.pkl" in ends:
        return "a PyTorch checkpoint (a pickle)", "load it into its module and give xform the module"
    if "model.weights.h5" in ends:
        return "a Keras model", "convert it to ONNX: model.export(path, format='onnx')"
    return "a zip archive", "unpack it first"


def _is_safetensors(data: bytes) -> bool:
    if len(data) < 10:
        return False
    (header,) = struct.unpack("<Q", data[:8])
    return 2 <= header < 100_000_000 and data[8:10] in (b'{"', b"{}")


def missing_bytes(data: bytes) -> int:
    """How many bytes the last top-level protobuf field lacks; 0 if the data does not look like a cut-off ModelProto.

    Walks the wire format: a model starts with its ir_version (field 1, a varint), and every field states its length.
    """
    position, first = 0, True
    while position < len(data):
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if not 1 <= field <= 30 or (first and field > 8):
            return 0
        first = False
        if wire == 0:
            _, after = _varint(data, position)
        elif wire == 2:
            length, after = _varint(data, position)
            after += length
        else:
            return 0
        if after > len(data):
            return after - len(data) if length_is_plausible(after) else 0
        position = after
    return 0


def length_is_plausible(size: int) -> bool:
    """Whether a protobuf of `size` bytes can exist."""
    return size <= PROTOBUF_LIMIT


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Value of the base-128 varint at `position`, and the position after it (beyond the end if it is cut off)."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return value, len(data) + 1
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, position


def _folder_error(path: Path) -> ModelError:
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".onnx")[:5]
    if (path / "saved_model.pb").exists():
        hint = "a TensorFlow SavedModel: convert it to ONNX with tf2onnx"
    elif names:
        hint = f"give the file itself: {', '.join(str(path / name) for name in names)}"
    else:
        hint = "give an .onnx file; there is none directly in this folder"
    return ModelError("the model path is a folder, not a file", where=os.fspath(path), hint=hint)
