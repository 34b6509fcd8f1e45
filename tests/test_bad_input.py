"""Bad input through the command line: a clear error, its exit code, no traceback, no half file, input untouched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from xform.cli import main

RANDOM = np.random.default_rng(11)
FLOAT = TensorProto.FLOAT


def make_proto(width: int = 64) -> onnx.ModelProto:
    """y = relu(x @ w + b)."""
    weights = [
        numpy_helper.from_array(RANDOM.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w", (width, width)), ("b", (width,)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"], name="product"),
        helper.make_node("Add", ["xw", "b"], ["s"], name="sum"),
        helper.make_node("Relu", ["s"], ["y"], name="activation"),
    ]
    infos = [helper.make_tensor_value_info(name, FLOAT, ["batch", width]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Workplace:
    """A folder with an input model, and an empty folder for output."""

    def __init__(self, root: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.inputs, self.outputs = root / "in", root / "out"
        self.inputs.mkdir()
        self.outputs.mkdir()
        self.model, self.result = self.inputs / "m.onnx", self.outputs / "m.onnx"
        self._capture = capture

    def optimize(self, *arguments: object, output: Path | None = None) -> tuple[int, str]:
        """Exit code and error text of `xform optimize`; checks that the input is as before."""
        before = contents(self.inputs)
        output = output or self.result
        code = main(["optimize", str(self.model), "-o", str(output), *map(str, arguments)])
        printed = self._capture.readouterr()
        assert contents(self.inputs) == before, "the input was changed"
        return code, printed.err

    def refused(self, code: int, *words: str, arguments: tuple[object, ...] = (), output: Path | None = None) -> None:
        """The command fails with this exit code, says these words, and leaves nothing in the output folder."""
        got, said = self.optimize(*arguments, output=output)
        assert got == code, said
        assert "Traceback" not in said
        assert said.count("error:") == 1
        for word in words:
            assert word in said, f"{word!r} is not in {said!r}"
        assert contents(self.outputs) == {}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Workplace]:
    yield Workplace(tmp_path, capsys)


def write(place: Workplace, change: Callable[[onnx.ModelProto], Any] | None = None) -> None:
    proto = make_proto()
    if change is not None:
        change(proto)
    place.model.write_bytes(proto.SerializeToString())


def test_the_model_itself_is_fine(place: Workplace) -> None:
    write(place)
    code, said = place.optimize()
    assert code == 0, said
    assert list(contents(place.outputs)) == ["m.onnx"]


def test_no_such_file(place: Workplace) -> None:
    place.refused(3, "no such model file", "m.onnx")


def test_truncated(place: Workplace) -> None:
    write(place)
    place.model.write_bytes(place.model.read_bytes()[:5000])
    place.refused(3, "truncated", "m.onnx")
    place.model.write_bytes(b"")
    place.refused(3, "empty")


def test_not_a_protobuf(place: Workplace) -> None:
    place.model.write_bytes(b"\xff\xfe these are not the bytes you are looking for")
    place.refused(3, "does not parse as a protobuf")
    place.model.write_bytes(b"\x80\x02}q\x00.")
    place.refused(3, "pickle")


@pytest.mark.parametrize("opset", [0, 99])
def test_wrong_opset(place: Workplace, opset: int) -> None:
    write(place, lambda proto: setattr(proto.opset_import[0], "version", opset))
    place.refused(3, f"opset {opset}")


def test_unknown_domain(place: Workplace) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node[2].domain, proto.graph.node[2].op_type = "com.example", "Secret"
        proto.opset_import.append(helper.make_opsetid("com.example", 1))

    write(place, change)
    place.refused(3, "com.example", "Secret", "activation")


def test_missing_external_data(place: Workplace) -> None:
    onnx.save(make_proto(), place.model, save_as_external_data=True, location="m.data", size_threshold=0)
    (place.inputs / "m.data").unlink()
    place.refused(3, "m.data", "initializer 'w'")


def test_external_data_outside_the_folder(place: Workplace, tmp_path: Path) -> None:
    onnx.save(make_proto(), place.model, save_as_external_data=True, location="m.data", size_threshold=0)
    (place.inputs / "m.data").rename(tmp_path / "m.data")
    proto = onnx.load(place.model, load_external_data=False)
    for location in ("../m.data", str(tmp_path / "m.data")):
        for tensor in proto.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        place.model.write_bytes(proto.SerializeToString())
        place.refused(3, "external data path", location)


def test_cycle(place: Workplace) -> None:
    write(place, lambda proto: proto.graph.node[0].input.__setitem__(0, "s"))
    place.refused(3, "cycle", "product", "sum")


def test_unsorted_is_sorted_with_a_warning(place: Workplace) -> None:
    write(place, lambda proto: proto.graph.node.insert(0, proto.graph.node.pop()))
    code, said = place.optimize()
    assert code == 0
    assert "not sorted" in said
    assert list(contents(place.outputs)) == ["m.onnx"]
    place.result.unlink()
    place.refused(3, "not sorted", arguments=("--strict",))


def test_nan_weights(place: Workplace) -> None:
    def change(proto: onnx.ModelProto) -> None:
        weights = numpy_helper.to_array(proto.graph.initializer[1]).copy()
        weights[3] = np.nan
        proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "b"))

    write(place, change)
    code, said = place.optimize()
    assert code == 0
    assert "b (NaN)" in said
    place.result.unlink()
    place.refused(3, "b (NaN)", arguments=("--strict",))


def test_input_name_that_does_not_exist(place: Workplace, tmp_path: Path) -> None:
    write(place)
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, X=np.zeros((2, 64), np.float32))
    place.refused(2, "'X'", "x", arguments=("--inputs", inputs))
    np.savez(inputs, x=np.zeros((2, 65), np.float32))
    place.refused(2, "x", "65", arguments=("--inputs", inputs))


def test_output_folder_without_rights(place: Workplace) -> None:
    write(place)
    if not Path("/sys/kernel").is_dir():
        pytest.skip("no folder here that refuses everyone")
    place.refused(2, "/sys/kernel", output=Path("/sys/kernel/m.onnx"))


def test_output_folder_that_is_none(place: Workplace, tmp_path: Path) -> None:
    write(place)
    place.refused(2, "mkdir", output=tmp_path / "missing" / "m.onnx")
    (tmp_path / "file").write_bytes(b"")
    place.refused(2, "is a file", output=tmp_path / "file" / "m.onnx")
    place.refused(2, "is a folder", output=place.outputs)


def test_output_over_the_input(place: Workplace) -> None:
    write(place)
    place.refused(2, "overwrite the input", output=place.model)


def test_json_carries_the_error(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.model.write_bytes(b"")
    code = main(["optimize", str(place.model), "-o", str(place.result), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == document["exit_code"] == 3
    assert document["error"]["kind"] == "ModelError"
    assert "empty" in document["error"]["what"]


def test_debug_shows_a_traceback(place: Workplace) -> None:
    place.model.write_bytes(b"")
    code, said = place.optimize("--debug")
    assert code == 3
    assert "Traceback" in said


# In processes of their own: limits, and a kill

LIMITED = """
    import resource, sys
    from xform.cli import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    sys.exit(main(["optimize", sys.argv[1], "-o", sys.argv[2]]))
"""

STALLING = """
    import os, sys, time
    from xform.graph import write
    from xform.cli import main
    stream = write._stream
    def stall(weight, file):
        stream(weight, file)
        file.flush()
        os.write(1, b"writing\\n")
        time.sleep(300)
    write._stream = stall
    sys.exit(main(["optimize", sys.argv[1], "-o", sys.argv[2]]))
"""


def command(code: str, place: Workplace) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), str(place.model), str(place.result)]


def test_full_disk(place: Workplace) -> None:
    """A limit on the size of files stands in for a full disk; tests/graph/test_write.py has a real one."""
    write(place)
    before = place.model.read_bytes()
    done = subprocess.run(command(LIMITED, place), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "larger than this system allows" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(place.outputs) == {}
    assert place.model.read_bytes() == before


def test_full_file_system(place: Workplace) -> None:
    write(place)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place.outputs)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs more rights")
    try:
        place.refused(2, "disk is full")
    finally:
        subprocess.run(["umount", str(place.outputs)], check=True)


@pytest.mark.parametrize("present", [False, True])
def test_killed_in_the_middle_of_writing(place: Workplace, present: bool) -> None:
    write(place)
    before = place.model.read_bytes()
    if present:
        place.result.write_bytes(before)
    with subprocess.Popen(
        command(STALLING, place), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "writing\n"
        left = [name for name in contents(place.outputs) if name != "m.onnx"]
        assert left == [f".m.onnx.{run.pid}.xform-tmp"], "the kill must hit in the middle of writing"
        os.kill(run.pid, signal.SIGKILL)
    assert place.result.exists() == present
    if present:
        assert place.result.read_bytes() == before, "the old result must still be whole"
    assert place.model.read_bytes() == before
    code, said = place.optimize()
    assert code == 0, said
    assert list(contents(place.outputs)) == ["m.onnx"], "the next run cleans up"
    onnx.checker.check_model(str(place.result))


def test_a_hundred_mutants() -> None:
    """A small version of benchmarks/fuzz.py, which runs 2,000."""
    fuzz = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
    command = [sys.executable, str(fuzz), "--json", "--count", "100", "--seed", "1", "--suite", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    document = json.loads(done.stdout)
    assert document["failed"] == []
    assert document["files"] == document["ok"] == 100
    assert document["exit_codes"].get("0", 0) > 10, "some mutants must get through, or nothing is tested"
