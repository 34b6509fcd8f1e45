"""Small JSON files that xform remembers decisions in, private to the user, in `$XFORM_CACHE` or the cache folder.

A cache is a convenience that anybody may have tampered with, so nothing of it is trusted and nothing of it can stop a
run: folders and files are of this user alone and never reached through links, an entry is what `valid` accepts, and
whatever is wrong is told, ignored and written anew. Entries appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xform.tell import tell
from xform.text import shown

MAX_BYTES = 16 << 20  # of one entry: more is not ours
_NAME = re.compile(r"[A-Za-z0-9_-]+\.json")
_LEFTOVER = re.compile(r"\.[A-Za-z0-9_-]+\.json\.[0-9a-f]{16}")
_LEFTOVER_SECONDS = 3600.0  # since a killed run began to write an entry

Valid = Callable[[Any], str | None]  # why an entry is not what it should be; None where it is


def cache_root() -> Path:
    """The folder of all caches: XFORM_CACHE, else `xform` in the user's cache folder.

    Raises:
        RuntimeError: The user has no home folder.
    """
    given = os.environ.get("XFORM_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return Path(base if os.path.isabs(base) else Path.home() / ".cache") / "xform"


def entries() -> list[Path]:
    """The files of all caches that could be read, for whoever must not write over them: links lead to none.

    Raises:
        RuntimeError: See `cache_root`.
    """
    root = cache_root()
    folders = [] if root.is_symlink() or not root.is_dir() else [f for f in root.iterdir() if not f.is_symlink()]
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return [file for file in files if file.is_file() and not file.is_symlink()]


class CacheFolder:
    """One folder of entries.

    Args:
        kind: Name of the folder: "tuning", "kernels".
        what: What is remembered, for messages: "tuning decisions".
    """

    def __init__(self, kind: str, what: str) -> None:
        self._kind = kind
        self._what = what

    @property
    def path(self) -> Path:
        """Where it is, see `cache_root`."""
        return cache_root() / self._kind

    def read(self, name: str, valid: Valid) -> Any | None:
        """The entry called `name`; None where there is none, or none that is `valid`, which is told."""
        with self._reported("read"), self._opened(create=False) as folder:
            try:
                return _read(folder, name, valid)
            except FileNotFoundError:
                return None
            except (OSError, ValueError, RecursionError, MemoryError) as error:
                self._tell_ignored(name, error)
        return None

    def write(self, name: str, change: Callable[[Any | None], Any], valid: Valid) -> None:
        """Replace an entry by what `change` makes of the one that is there (None: none, or none that is `valid`).

        Under a lock, so that what two processes find at the same time is not lost; what cannot be written is told.
        """
        with self._reported("written"), self._opened(create=True) as folder, _locked(folder):
            try:
                before = _read(folder, name, valid)
            except (OSError, ValueError, RecursionError, MemoryError):  # told where it was read
                before = None
            _write(folder, name, json.dumps(change(before), indent=1, allow_nan=False).encode())

    @contextlib.contextmanager
    def _opened(self, *, create: bool) -> Iterator[int]:
        """A descriptor of the folder, after checking that it is a folder of this user and no link."""
        path = self.path
        if create:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path.name, 0o700, dir_fd=parent)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            folder = os.open(path.name, flags, dir_fd=parent)
        finally:
            os.close(parent)
        try:
            _check_owner(os.fstat(folder))
            if stat.S_IMODE(os.fstat(folder).st_mode) & 0o077:
                os.fchmod(folder, 0o700)
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _reported(self, done: str) -> Iterator[None]:
        """Tell what stands in the way of the folder, and go on."""
        try:
            yield
        except FileNotFoundError:
            if done == "written":
                self._tell_unusable("it cannot be made")
        except (OSError, RuntimeError, ValueError) as error:
            is_link = isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EMLINK)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._tell_unusable("a link or a file stands in its place" if is_link or _is_file(error) else reason)

    def _tell_unusable(self, reason: str) -> None:
        where = os.environ.get("XFORM_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        tell(
            f"{self._what} are not remembered: the folder {self._kind!r} in the cache folder {shown(where)} cannot be "
            f"used: {reason}; set XFORM_CACHE to a folder of your own"
        )

    def _tell_ignored(self, name: str, error: BaseException) -> None:
        is_link = isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EMLINK)
        reason = "it is a link" if is_link else shown(error) or type(error).__name__
        tell(f"the remembered {self._what} in {self._kind}/{name} are ignored, and found again: {reason}")


def _is_file(error: BaseException) -> bool:
    return isinstance(error, NotADirectoryError)


def _check_owner(found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, "it belongs to another user")


def _read(folder: int, name: str, valid: Valid) -> Any:
    """The entry. Raises OSError, ValueError or RecursionError where it is not what it should be."""
    _check_name(name)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        _check_owner(found)
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    entry = json.loads(data)
    wrong = valid(entry)
    if wrong is not None:
        raise ValueError(wrong)
    return entry


def _write(folder: int, name: str, data: bytes) -> None:
    """Write an entry under a name that nobody can guess, and rename it: that replaces a link and does not follow it."""
    _check_name(name)
    _remove_leftovers(folder)
    hidden = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(hidden, flags, 0o600, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _make_way(folder, name)
        os.replace(hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden, dir_fd=folder)
        raise


def _make_way(folder: int, name: str) -> None:
    """Remove an empty folder that has the name of an entry, which a rename does not replace."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.rmdir(name, dir_fd=folder)


def _remove_leftovers(folder: int) -> None:
    """Remove what killed runs left half written."""
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime
                if age > _LEFTOVER_SECONDS:
                    os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _locked(folder: int) -> Iterator[None]:
    """Hold the lock of a folder, where its file system has locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX)  # ends with the descriptor
    yield


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of an entry")
