"""Reading .npz files that anybody may have written."""

from __future__ import annotations

import io
import os
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from xform import limits
from xform.errors import LimitError, UsageError
from xform.npz import read_npz


def header(shape: str, dtype: str = "'<f4'", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_as_it_was(tmp_path, save):
    rng = np.random.default_rng(1)
    arrays = {
        "x": rng.normal(size=(3, 4)).astype(np.float32),
        "columns": np.asfortranarray(rng.normal(size=(5, 7))),
        "scalar": np.float32(3.5),
        "none": np.zeros((0, 4), np.int64),
        "words": np.asarray(["a", "bcd"]),
        "flags": np.asarray([True, False]),
        "big_endian": np.arange(4, dtype=">i4"),
    }
    save(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == np.shape(array)
        assert found[name].dtype == np.asarray(array).dtype.newbyteorder("=")
    assert found["x"].flags.writeable


def test_a_header_that_lies_about_its_size_allocates_nothing(tmp_path):
    path = archive(tmp_path / "x.npz", x=header("(1000000, 1000000)") + b"\0" * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"header says float32\[1000000, 1000000\]"):
        read_npz(path, "the inputs")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1 << 20, np.uint8), y=np.zeros(1 << 20, np.uint8))
    with limits.limited(limits.Limits(memory=1 << 20)), pytest.raises(LimitError, match="limit 'memory'"):
        read_npz(tmp_path / "x.npz")


def test_a_directory_that_says_less_than_there_is_reads_no_more_than_it_says(tmp_path):
    path = archive(tmp_path / "x.npz", x=npy(np.zeros(1 << 16, np.float32)))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02") + 24  # the unpacked size in the central directory
    data[at : at + 4] = (64 + 128 + 16).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UsageError):
        read_npz(path)


def test_pickled_objects_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = archive(tmp_path / "x.npz", x=npy(np.asarray([Trap()], object)))
    with pytest.raises(UsageError, match="pickled objects, which are never loaded"):
        read_npz(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x.npy", npy(np.zeros(3)))
        file.writestr("x.npy", npy(np.ones(3)))
    with pytest.raises(UsageError, match="'x' twice"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no valid header"),
        (b"\x93NUMPY", "no valid header"),
        (b"not an array", "no valid header"),
        (header("(" * 900 + ")" * 900), "no valid header"),
        (header("(-1, -4)") + b"\0" * 16, "shape"),
        (header("(2,)") + b"\0" * 4, "4 follow"),
        (header("(2,)") + b"\0" * 12, "12 follow"),
        (header("(2,)", "[('a', '<f4'), ('b', '<f4')]") + b"\0" * 16, "dtype"),
        (header("(2,)", "'<M8[s]'") + b"\0" * 16, "dtype"),
        (header("(1000000000000,)", "'|V0'"), "dtype"),
        (header("(1,)", version=b"\x09\x00") + b"\0" * 4, "version"),
    ],
)
def test_a_damaged_array_is_named(tmp_path, data, told):
    with pytest.raises(UsageError, match=told) as error:
        read_npz(archive(tmp_path / "x.npz", weights=data), "the calibration data")
    assert "'weights' of the calibration data" in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 60, 200, -30, -1])
def test_a_truncated_archive_is_refused(tmp_path, keep):
    path = archive(tmp_path / "x.npz", x=npy(np.random.default_rng(2).normal(size=64)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"not an \.npz archive"):
        read_npz(path)


def test_flipped_bits_are_refused(tmp_path):
    path = archive(tmp_path / "x.npz", x=npy(np.random.default_rng(3).normal(size=64)))
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UsageError):
        read_npz(path)


def test_what_is_not_an_archive_of_arrays_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    os.mkfifo(tmp_path / "pipe.npz")
    for name, told in (
        ("x.npy", "not an .npz"),
        ("other.npz", "not an array"),
        ("pipe.npz", "not a regular file"),  # without waiting for a writer
        ("absent.npz", "No such file"),
        (".", "not a regular file"),
    ):
        with pytest.raises(UsageError, match=told):
            read_npz(tmp_path / name)


def test_the_size_of_the_file_earns_memory_and_other_files_count_too(tmp_path):
    zeros = npy(np.zeros(100_000, np.float32))
    np.savez(tmp_path / "plain.npz", x=np.zeros(100_000, np.float32))
    packed = archive(tmp_path / "packed.npz", x=zeros)
    with limits.limited(limits.limits_of({"memory": 16 * 400_000})):
        plain = read_npz(tmp_path / "plain.npz")
        assert plain.packed > 400_000 and plain.nbytes == 400_000
        held = read_npz(packed)
        assert held.packed < 4000
        with pytest.raises(LimitError, match="with the files before it"):
            read_npz(packed, kept=[held])
        read_npz(tmp_path / "plain.npz", kept=[held])  # which brings as much as it holds
