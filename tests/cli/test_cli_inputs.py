"""`--inputs`: whatever is in the file, exit code 2 with the array's name, or it is used."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Run

from xform.errors import UsageError
from xform.pipeline.given import check_useful

CLI = Callable[..., Run]
NORMAL = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def _with(value: float) -> Any:
    array = NORMAL.copy()
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x": np.array([["a"] * 8])}, "'x'"),
        ({"x": np.array([[b"a"] * 8])}, "'x'"),
        ({"x": _with(np.nan)}, "'x' of the inputs file holds NaN"),
        ({"x": _with(np.inf)}, "'x' of the inputs file holds infinity"),
        ({"x": np.full((3, 8), -np.inf, np.float32)}, "'x' of the inputs file holds infinity only"),
        ({"x": NORMAL.astype(np.complex64)}, "'x'"),
        ({"x": NORMAL[0]}, "'x' has shape"),
        ({"x": NORMAL[:, :7]}, "'x' has shape"),
        ({"x": NORMAL[:0]}, "empty: x"),
        ({"y": NORMAL}, "'y'"),
        ({"x": NORMAL, "z": NORMAL}, "'z'"),
        ({}, "no array"),
    ],
)
@pytest.mark.parametrize("command", [("optimize", "mlp.onnx"), ("verify", "mlp.onnx", "mlp.onnx")])
def test_useless_arrays_end_with_2_and_are_named(
    xform: CLI, mlp: Path, tmp_path: Path, command: tuple[str, ...], arrays: dict[str, Any], told: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    run = xform(*command, "--inputs", "x.npz")
    assert run.code == 2, run.err
    assert told in run.err and "Traceback" not in run.err


def _object(path: Path) -> None:
    np.savez(path, x=np.array([object()], dtype=object), allow_pickle=True)


def _lying(path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", member)


def _truncated(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=NORMAL)
    path.write_bytes(buffer.getvalue()[:-100])


def _not_an_archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 nothing")


def _bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, NORMAL)


@pytest.mark.parametrize("write", [_object, _lying, _truncated, _not_an_archive, _bare_array])
def test_files_that_cannot_be_trusted_end_with_2(
    xform: CLI, mlp: Path, tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "x.npz")
    run = xform("optimize", mlp, "--inputs", "x.npz")
    assert run.code == 2, run.err
    assert "x.npz" in run.err and "Traceback" not in run.err


def test_a_mask_of_zero_and_minus_infinity_is_useful() -> None:
    check_useful({"mask": np.array([0.0, -np.inf], np.float32), "none": np.zeros((0, 4), np.float32)}, "the file")
    with pytest.raises(UsageError, match="NaN"):
        check_useful({"mask": np.array([0.0, np.nan], np.float64)}, "the file")
    with pytest.raises(UsageError, match="infinity"):
        check_useful({"z": np.array([complex(0, -np.inf)])}, "the file")


def test_good_inputs_are_used(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=NORMAL)
    run = xform("optimize", mlp, "--inputs", "x.npz", "--json")
    assert run.code == 0
    assert run.json["report"]["verification"]["given"] == run.json["report"]["verification"]["cases"] == 1
    assert "on 1 given input set" in run.err
    assert "random input set" in xform("optimize", mlp).err
