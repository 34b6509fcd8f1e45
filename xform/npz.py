"""Arrays from an .npz file that anybody may have written: nothing is unpickled, and nothing is allocated on its word.

An .npz is a zip archive of .npy members. Its central directory and the header of each member say how large an array is;
both are checked against each other and against `xform.limits` before memory is taken. A member may be compressed a
thousand times, so what arrays bring to a limit is the size of the file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from xform import limits
from xform.errors import UsageError
from xform.text import shown

HINT = "write the file with numpy.savez(path, input_name=array, ...)"
Array = npt.NDArray[Any]
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes
_KINDS = "biufcUSV"  # of dtypes: V is what numpy makes of bfloat16 and float8
_USED = 16  # times the bytes of arrays that a run on them may take; as much as they earn where they were not packed
_PACKING = 16  # times that honest data becomes smaller; zeros become a thousand times smaller
_ENCRYPTED = 0x1
_DAMAGED = (OSError, EOFError, ValueError, struct.error, zipfile.BadZipFile, zlib.error, NotImplementedError)


def read_npz(
    path: str | os.PathLike[str], what: str = "the file", kept: Sequence[limits.Unpacked] = ()
) -> limits.Unpacked:
    """The arrays of an .npz file by name, in the order of the file, in native byte order.

    Args:
        path: A regular file; links to one are followed.
        what: Subject of error messages: "the inputs file", "the calibration file".
        kept: What was read from other files and is still there; it counts too.

    Raises:
        UsageError: The file cannot be read, is not an .npz, is damaged, holds pickled objects or a name twice, or the
            header of an array does not fit its data.
        LimitError: Working on the arrays, with those that are `kept`, would take more than the limit "memory": a file
            that is not compressed, or not more than 16 times, is never refused for that.
    """
    where = str(path)
    try:
        with _opened(Path(path)) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive, what, where)
            packed = os.fstat(file.fileno()).st_size
            total = sum(info.file_size for info in members.values()) + sum(one.nbytes for one in kept)
            subject = f"working on {total:,} bytes of arrays in {what} {shown(where)}"
            subject += ", with the files before it," if kept else ""
            packed_of_all = packed + sum(one.packed for one in kept)
            limits.check("memory", _USED * total, subject, where, brought=_PACKING * packed_of_all)
            arrays = {name: _array(archive, info, name, what, where) for name, info in members.items()}
            return limits.Unpacked(arrays, packed)
    except zipfile.BadZipFile as error:
        raise UsageError(f"{what} is not an .npz archive, or is damaged: {error}", where=where, hint=HINT) from error
    except _DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{what} cannot be read: {reason or type(error).__name__}", where=where, hint=HINT) from error


def _opened(path: Path) -> IO[bytes]:
    """The file, if it is a regular one: opening a pipe would wait for a writer, a device has no end.

    It is looked at before, as opening a device may do something, and after, as it may be another one by then.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is not a regular file")
    return os.fdopen(handle, "rb")


def _members(archive: zipfile.ZipFile, what: str, where: str) -> dict[str, zipfile.ZipInfo]:
    """The members of the archive by the name of their array."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise UsageError(f"{what} holds {shown(name)!r}, which is not an array", where=where, hint=HINT)
        if name in found:
            raise UsageError(f"{what} holds the array {shown(name)!r} twice", where=where, hint=HINT)
        if info.flag_bits & _ENCRYPTED or info.compress_type not in _COMPRESSIONS:
            how = "encrypted" if info.flag_bits & _ENCRYPTED else "compressed in a way that numpy does not use"
            raise UsageError(f"array {shown(name)!r} of {what} is {how}", where=where, hint=HINT)
        found[name] = info
    return found


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, what: str, where: str) -> Array:
    """One array, its header held against the size that the archive gives for the member."""
    subject = f"array {shown(name)!r} of {what}"
    with archive.open(info) as member:
        shape, fortran, dtype = _header(member, subject, where)
        size = math.prod(shape) * dtype.itemsize
        held = info.file_size - member.tell()
        if size != held:
            raise UsageError(
                f"{subject} is damaged: its header says {dtype}{list(shape)}, {size:,} bytes, but {held:,} follow",
                where=where,
                hint=HINT,
            )
        flat = np.empty(math.prod(shape), dtype)
        raw: Any = flat.view(np.uint8)
        _fill(member, memoryview(raw), subject, where)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _header(member: IO[bytes], subject: str, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(member)
        if version not in readers:
            raise ValueError(f"it has version {version} of the format, which only records with names need")
        shape, fortran, dtype = readers[version](member)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, EOFError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{subject} has no valid header: {reason[0][:200]}", where=where, hint=HINT) from error
    if dtype.hasobject:
        raise UsageError(f"{subject} holds pickled objects, which are never loaded", where=where, hint=HINT)
    if dtype.kind not in _KINDS or dtype.fields or dtype.subdtype or not dtype.itemsize:
        raise UsageError(f"{subject} has dtype {dtype}, which no model takes", where=where, hint=HINT)
    if any(dim < 0 for dim in shape) or len(shape) > 64:
        raise UsageError(f"{subject} has the shape {list(shape)[:8]}", where=where, hint=HINT)
    return shape, fortran, dtype


def _fill(member: IO[bytes], buffer: memoryview, subject: str, where: str) -> None:
    """Read until the buffer is full and the end is reached, which checks the checksum."""
    done = 0
    while done < len(buffer):
        part = member.read(min(len(buffer) - done, 1 << 20))
        if not part:
            raise UsageError(f"{subject} ends after {done:,} of {len(buffer):,} bytes", where=where, hint=HINT)
        buffer[done : done + len(part)] = part
        done += len(part)
    if member.read(1):
        raise UsageError(f"{subject} is longer than its header says", where=where, hint=HINT)
