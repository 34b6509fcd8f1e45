"""Files that appear whole or not at all, also when the process is killed at any moment.

A file is written under a hidden name `.NAME.PID.xform-tmp` in the folder of its target, synced, and renamed. While
its writer lives it holds a lock on it, so that leftovers of killed runs can be told from files still being written,
also where several containers with process ids of their own share a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import onnx
from google.protobuf.message import DecodeError

from xform.errors import OutputError, UsageError

SUFFIX = ".xform-tmp"
_DATA_NAME = r"{}(\.(\d+))?\.data"  # of the weights of a model


class Staged:
    """A file being written under a temporary name beside `target`; gone again unless committed.

    Args:
        target: The final path, in the same folder.
        part: Part of the temporary name that tells two files of one target apart.
    """

    def __init__(self, target: Path, part: str = "") -> None:
        self.path = target.with_name(f".{target.name}{part}.{os.getpid()}{SUFFIX}")
        self._mode = target.stat().st_mode & 0o7777 if target.exists() else None
        self._committed = False

    def __enter__(self) -> Self:
        try:
            self.file: BinaryIO = self.path.open("xb")
        except FileExistsError as error:
            raise OutputError("the same file is being written by this process already", where=str(self.path)) from error
        _lock(self.file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._mode is not None:
            os.fchmod(self.file.fileno(), self._mode)
        return self

    def finish(self) -> None:
        """Flush what was written to the disk itself, where a full disk shows at the latest."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def commit(self, path: Path) -> None:
        """Give the file its final name, in place of what has it now."""
        os.replace(self.path, path)
        self._committed = True
        _sync_folder(path.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self.file.close()  # flushes what is left: on a full disk that fails a second time


def write_bytes(target: str | os.PathLike[str], data: bytes) -> Path:
    """Write a small file (a report) atomically.

    Raises:
        OutputError: It cannot be written; nothing is left behind.
    """
    path = resolve(Path(target))
    try:
        remove_leftovers(path)
        with Staged(path) as staged:
            staged.file.write(data)
            staged.finish()
            staged.commit(path)
    except OSError as error:
        raise output_error(error, path) from error
    return path


def resolve(path: Path) -> Path:
    """The absolute file behind `path` (a link is followed), after checking that a file can be there.

    Raises:
        OutputError: The folder does not exist, or the path is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if path.name in ("", ".", "..") or target.is_dir():
        raise OutputError("the output path is a folder", where=str(path), hint="give a file name in it")
    if target.exists() and not target.is_file():
        raise OutputError("the output path is not a regular file", where=str(path), hint="give a file name")
    if not target.parent.is_dir():
        exists = target.parent.exists()
        what = "the output folder is a file" if exists else "the output folder does not exist"
        hint = "give another folder" if exists else f"create it: mkdir -p {target.parent}"
        raise OutputError(what, where=str(target.parent), hint=hint)
    return target


def remove_leftovers(target: Path) -> list[Path]:
    """Remove temporary files that killed runs left for `target`; returns which."""
    removed = []
    pattern = re.compile(rf"\.{re.escape(target.name)}(\.data)?\.\d+{re.escape(SUFFIX)}")
    for name in os.listdir(target.parent):
        if pattern.fullmatch(name):
            path = target.with_name(name)
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                    path.unlink()
                    removed.append(path)
    return removed


def refuse_overwriting(outputs: Iterable[Path], read: Iterable[Path]) -> None:
    """Refuse to write over a file that this run reads, whatever it is called: links lead to one device and inode.

    Args:
        outputs: What is asked to be written; the files that a save of each may write or replace beside it count too.
        read: Every file that the run reads. Those that do not exist are left out.

    Raises:
        UsageError: Naming the output and what it is.
    """
    known: dict[tuple[int, int], Path] = {}
    for path in read:
        with contextlib.suppress(OSError):
            status = path.stat()
            known.setdefault((status.st_dev, status.st_ino), path)
    for output in outputs:
        for path in (output, *beside(output)):
            with contextlib.suppress(OSError):
                status = path.stat()
                source = known.get((status.st_dev, status.st_ino))
                if source is not None:
                    also = "" if path == output else f", which is written with {output.name},"
                    raise UsageError(
                        f"{path}{also} would overwrite the input {source}, which this run reads",
                        where=str(path),
                        hint="give the output another name",
                    )


def beside(target: Path) -> list[Path]:
    """Files beside `target` that writing a model there may write or replace: its weights."""
    if target.suffix == ".xml":
        return [target.with_suffix(".bin")]
    real = Path(os.path.realpath(target))
    pattern = re.compile(_DATA_NAME.format(re.escape(real.name)))
    try:
        return [real.with_name(name) for name in os.listdir(real.parent) if pattern.fullmatch(name)]
    except OSError:  # there is no such folder; `resolve` tells
        return []


def data_names(target: Path) -> tuple[list[Path], str]:
    """The data files of the model now at `target` that the next save replaces, and a free name for the next one.

    Only files of our own naming (`NAME.data`, `NAME.1.data`, ...) are ever replaced: those that the present model
    points to, and numbered ones that a killed run left between its two renames.
    """
    pattern = re.compile(_DATA_NAME.format(re.escape(target.name)))
    ours = {name: match for name in os.listdir(target.parent) if (match := pattern.fullmatch(name))}
    if not ours:
        return [], f"{target.name}.data"
    pointed = _locations(target)
    old = [target.with_name(name) for name, match in ours.items() if name in pointed or match[2]]
    free, number = f"{target.name}.data", 0
    while free in ours or (number == 0 and old):  # only numbered names can be told to be ours after a kill
        number += 1
        free = f"{target.name}.{number}.data"
    return old, free


def _locations(path: Path) -> set[str]:
    """Data files that the model at `path` points to; none if there is no readable model."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (FileNotFoundError, DecodeError):
        return set()
    return {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that two runs do not replace files in it at the same time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Take a lock that ends with the process; False if another holds it or the file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return False
        raise
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(error: OSError, target: Path) -> OutputError:
    """What a failed write means and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free
        what, hint = (
            "the disk is full",
            f"{free / 1e6:.0f} MB are free in {target.parent}; free more or write elsewhere",
        )
    elif error.errno == errno.EFBIG:
        what, hint = (
            "the file would be larger than this system allows",
            "raise the limit (ulimit -f) or write elsewhere",
        )
    elif error.errno in (errno.EACCES, errno.EPERM):
        what, hint = f"no right to write in {target.parent}", "choose another folder, or change its rights"
    elif error.errno == errno.EROFS:
        what, hint = f"{target.parent} is read-only", "choose another folder"
    else:
        what, hint = f"cannot write: {error.strerror or error}", "choose another path"
    return OutputError(what, where=str(target), hint=hint)
