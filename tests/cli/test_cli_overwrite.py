"""No output replaces a file that the run reads, whatever name leads to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_support import Run
from onnx import TensorProto, external_data_helper, helper

import xform as package
from xform.errors import UsageError

CLI = Callable[..., Run]


@pytest.fixture
def split(mlp: Path) -> Path:
    """The model with its weights in w.bin, and files to read beside it."""
    model = onnx.load(mlp)
    external_data_helper.convert_model_to_external_data(model, location="w.bin", size_threshold=0)
    mlp.unlink()
    onnx.save(model, mlp)
    rng = np.random.default_rng(1)
    (mlp.parent / "samples").mkdir()
    for name in ("x.npz", "samples/a.npz"):
        np.savez(mlp.parent / name, x=rng.standard_normal((3, 8)).astype(np.float32))
    return mlp


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_that_an_option_of_a_pass_names_is_not_replaced(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "ranges.onnx.npz", n=np.zeros((2, 3)))
    (tmp_path / "ranges.onnx.npz").rename(tmp_path / "ranges.onnx")
    before = _contents(tmp_path)
    run = xform("optimize", mlp, "--set", "migrate_scales.ranges=ranges.onnx", "-o", "ranges.onnx")
    assert run.code == 2 and "ranges.onnx" in run.err and _contents(tmp_path) == before


READ = ["mlp.onnx", "w.bin", "x.npz", "samples/a.npz"]


@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(("option", "suffix"), [("-o", ".onnx"), ("--report", ".json")])
def test_what_the_run_reads_is_refused_before_any_work(
    xform: CLI, split: Path, tmp_path: Path, read: str, how: str, option: str, suffix: str
) -> None:
    output = read
    if how != "itself":
        output = f"other{suffix}"
        (os.symlink if how == "link" else os.link)(tmp_path / read, tmp_path / output)
    before = _contents(tmp_path)
    options = ("--inputs", "x.npz", "--calibration", "samples", "--preset", "int8", "--verify", "off")
    run = xform("optimize", split, option, output, *options)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err and "wrote" not in run.err
    if output.endswith(suffix):
        assert "would overwrite the input" in run.err and output in run.err
    assert _contents(tmp_path) == before


def test_data_files_of_functions_and_branches_count(tmp_path: Path) -> None:
    from xform.capture.onnx_file import files_of

    tensor = helper.make_tensor("t", TensorProto.FLOAT, [2], [1.0, 2.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="branch.bin")
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor)],
        "then",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])],
    )
    node = helper.make_node("If", ["p"], ["y"], then_branch=body, else_branch=body)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("p", TensorProto.BOOL, [])], [])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert files_of(tmp_path / "m.onnx") == [tmp_path / "m.onnx", tmp_path / "branch.bin"]


@pytest.mark.parametrize("output", ["out.onnx", "out.xml"])
def test_weights_that_would_be_written_beside_the_output_are_refused(
    xform: CLI, mlp: Path, tmp_path: Path, output: str
) -> None:
    data = "out.onnx.1.data" if output == "out.onnx" else "out.bin"
    model = onnx.load(mlp)
    external_data_helper.convert_model_to_external_data(model, location=data, size_threshold=0)
    mlp.unlink()
    onnx.save(model, mlp)
    before = _contents(tmp_path)
    run = xform("optimize", mlp, "-o", output, "--backend", "openvino", "--verify", "off")
    assert run.code == 2 and "would overwrite the input" in run.err, run.err
    assert _contents(tmp_path) == before


def test_save_in_python_refuses_the_source_and_its_data(split: Path, tmp_path: Path) -> None:
    before = _contents(tmp_path)
    fast = package.optimize(split, verify="off")
    (tmp_path / "w.onnx").symlink_to("w.bin")
    for path in (split, tmp_path / "w.onnx"):
        with pytest.raises(UsageError, match="would overwrite the input"):
            fast.save(path)
    (tmp_path / "m.report.json").symlink_to("w.bin")
    with pytest.raises(UsageError, match="would overwrite the input"):
        fast.save(tmp_path / "m.onnx", report=True)
    (tmp_path / "m.report.json").unlink()
    (tmp_path / "w.onnx").unlink()
    assert _contents(tmp_path) == before


def test_reports_of_two_models_in_one_folder_are_two_files(mlp: Path, tmp_path: Path) -> None:
    fast = package.optimize(mlp, verify="off")
    for name in ("a", "b"):
        assert fast.save(tmp_path / f"{name}.onnx", report=True)[-1] == tmp_path / f"{name}.report.json"
    assert (tmp_path / "a.report.json").is_file()


@pytest.mark.parametrize("name", ["m.pt", "m.xml", "m", "m.ONNX"])
def test_a_suffix_of_another_format_is_refused_in_python(mlp: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.onnx"):
        package.optimize(mlp, verify="off").save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]
