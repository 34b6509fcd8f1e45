"""Bad models and bad places, end to end: the right exit code, no traceback, no half file, the input untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_support import Run, save_mlp
from onnx import TensorProto, external_data_helper, helper

CLI = Callable[..., Run]


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _not_a_protobuf(path: Path) -> None:
    path.write_text("<html>not found</html>")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _opset_from_the_future(path: Path) -> None:
    model = onnx.load(path)
    model.opset_import[0].version = 9999
    onnx.save(model, path)


def _unknown_domain(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].domain = "nobody.knows"
    onnx.save(model, path)


def _unknown_operator(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].op_type = "MatMull"
    onnx.save(model, path)


def _external(path: Path, location: str) -> None:
    model = onnx.load(path)
    external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def _external_data_missing(path: Path) -> None:
    _external(path, "absent.bin")


def _external_data_outside(path: Path) -> None:
    (path.parent.parent / "outside.bin").write_bytes(b"\0" * 4096)
    _external(path, "../outside.bin")


def _cyclic(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].input[0] = "a"
    onnx.save(model, path)


def _dangling(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[1].input[1] = "nowhere"
    onnx.save(model, path)


BAD = [
    _truncated,
    _not_a_protobuf,
    _empty,
    _opset_from_the_future,
    _unknown_operator,
    _external_data_missing,
    _external_data_outside,
    _cyclic,
    _dangling,
]


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__.strip("_"))
def test_a_bad_model_ends_with_3_and_says_what_and_where(
    xform: CLI, mlp: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(mlp)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = xform("optimize", mlp, "-o", "out.onnx", "--report", "report.json")
    assert run.code == 3, run.err
    assert run.err.startswith("error: ") and "Traceback" not in run.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unknown_domain_is_named(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    _unknown_domain(mlp)
    run = xform("optimize", mlp, "-o", "out.onnx")
    assert run.code in (3, 7), run.err
    assert "nobody.knows" in run.err
    assert not (tmp_path / "out.onnx").exists()


def test_an_unsorted_graph_is_read_with_a_note(xform: CLI, mlp: Path) -> None:
    model = onnx.load(mlp)
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, mlp)
    run = xform("inspect", mlp, "--json")
    assert run.code in (0, 3)
    assert run.json.get("notes") or run.json.get("error")


def test_nan_weights_are_told(xform: CLI, mlp: Path) -> None:
    model = onnx.load(mlp)
    array = onnx.numpy_helper.to_array(model.graph.initializer[1]).copy()
    array[3] = np.nan
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(array, "fc1.bias"))
    onnx.save(model, mlp)
    run = xform("optimize", mlp, "--json")
    assert run.code == 0
    assert "NaN" in " ".join(run.json["report"]["warnings"])


def test_a_folder_as_model_or_output(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    assert xform("inspect", tmp_path).code == 3
    assert xform("optimize", mlp, "-o", tmp_path).code == 2


def test_a_folder_that_takes_no_files(xform: CLI, mlp: Path) -> None:
    run = xform("optimize", mlp, "-o", "/proc/out.onnx")  # nobody, not even root, can create files there
    assert run.code == 2
    assert "Traceback" not in run.err


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the write fails in the middle."""
    large = save_mlp(tmp_path / "large.onnx", hidden=4096)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"what was there before")
    command = (
        f"ulimit -f 64; exec {sys.executable} -m xform optimize {large} -o {out} --passes raise_linear --verify off"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"what was there before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "out.onnx"]


@pytest.mark.parametrize("wait", [1.5, 3.5])
def test_a_killed_run_leaves_no_half_file(tmp_path: Path, wait: float) -> None:
    model = save_mlp(tmp_path / "m.onnx", hidden=200_000)
    before = model.read_bytes()
    out = tmp_path / "out.onnx"
    command = [sys.executable, "-m", "xform", "optimize", str(model), "-o", str(out), "--verify", "off"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.name.endswith(".xform-tmp") for path in tmp_path.iterdir()):
            break  # it is writing: the worst moment
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert model.read_bytes() == before
    assert not out.exists() or len(out.read_bytes()) > 0.9 * len(before)
    if out.exists():
        onnx.checker.check_model(str(out))


def test_models_with_strings_and_no_inputs_do_not_crash(xform: CLI, tmp_path: Path) -> None:
    value = helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xff"])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["text"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [2])],
        [value],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "s.onnx")
    assert xform("optimize", "s.onnx", "-o", "out.onnx").code == 0
