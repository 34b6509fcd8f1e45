"""Saving: the same model comes back, atomically, with weights streamed, and never over the input."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from xform.errors import OutputError, UsageError
from xform.graph import write
from xform.graph.atomic import write_bytes
from xform.graph.write import save, skeleton, to_bytes

RANDOM = np.random.default_rng(7)


def make_model(scale: float = 1.0, rows: int = 64) -> ir.Model:
    """y = x @ w + b, with one large and one small initializer, metadata, and a dynamic dim."""
    w = ir.tensor((RANDOM.standard_normal((rows, 32)) * scale).astype(np.float32), name="w")
    b = ir.tensor(RANDOM.standard_normal(32).astype(np.float32), name="b")
    x = ir.Value(name="x", shape=ir.Shape(["batch", rows]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [ir.Value(name=t.name, const_value=t, shape=t.shape, type=ir.TensorType(t.dtype)) for t in (w, b)]
    product = ir.node("MatMul", [x, weights[0]], name="product")
    total = ir.node("Add", [product.outputs[0], weights[1]], name="sum")
    total.outputs[0].name, total.outputs[0].dtype = "y", ir.DataType.FLOAT
    total.outputs[0].shape = ir.Shape(["batch", 32])
    graph = ir.Graph([x], total.outputs, nodes=[product, total], initializers=weights, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10, metadata_props={"author": "me"})


def weight(path: Path, name: str) -> np.ndarray:
    return ir.load(path).graph.initializers[name].const_value.numpy()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("external", [False, True])
def test_what_is_saved_comes_back(tmp_path: Path, external: bool) -> None:
    model = make_model()
    files = save(model, tmp_path / "m.onnx", external_data=external)
    assert names(tmp_path) == {p.name for p in files} == ({"m.onnx", "m.onnx.data"} if external else {"m.onnx"})
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    back = ir.load(tmp_path / "m.onnx")
    assert back.metadata_props == {"author": "me"}
    assert [str(d) for d in back.graph.inputs[0].shape] == ["batch", "64"]
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(back.graph.initializers[name].const_value.numpy(), value.const_value.numpy())
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor), "the model itself changed"


def test_bytes_are_what_onnx_reads() -> None:
    model = make_model()
    proto = onnx.load_from_string(to_bytes(model))
    onnx.checker.check_model(proto, full_check=True)
    assert {t.name for t in proto.graph.initializer} == {"w", "b"}
    assert proto.graph.initializer[0].data_location == onnx.TensorProto.DEFAULT


def test_all_dtypes_round_trip(tmp_path: Path) -> None:
    kinds = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT4", "UINT4", "INT8", "BOOL", "FLOAT8E4M3FN", "COMPLEX64"]
    model = make_model()
    for kind in kinds:
        dtype = ir.DataType[kind]
        array = RANDOM.integers(0, 2, (2049,)).astype(dtype.numpy())
        tensor = ir.Tensor(array, dtype, name=kind)
        model.graph.register_initializer(
            ir.Value(name=kind, const_value=tensor, shape=tensor.shape, type=ir.TensorType(dtype))
        )
    texts = ir.StringTensor([b"a\xc3\xa9", b"\xff"] * 2000, shape=ir.Shape([4000]), name="texts")
    model.graph.register_initializer(
        ir.Value(name="texts", const_value=texts, shape=texts.shape, type=ir.TensorType(ir.DataType.STRING))
    )
    for external in (False, True):
        save(model, tmp_path / "m.onnx", external_data=external)
        for name, value in model.graph.initializers.items():
            got = ir.load(tmp_path / "m.onnx").graph.initializers[name].const_value
            assert got.dtype == value.const_value.dtype
            assert got.numpy().tolist() == value.const_value.numpy().tolist(), name


def test_shared_tensor_is_written_once(tmp_path: Path) -> None:
    model = make_model()
    tensor = model.graph.initializers["w"].const_value
    tied = ir.Value(name="tied", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(tied)
    save(model, tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size == tensor.nbytes
    np.testing.assert_array_equal(weight(tmp_path / "m.onnx", "tied"), weight(tmp_path / "m.onnx", "w"))


def test_large_models_get_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "INLINE_LIMIT", 1000)
    assert [p.name for p in save(make_model(), tmp_path / "m.onnx")] == ["m.onnx", "m.onnx.data"]
    with pytest.raises(UsageError):
        save(make_model(), tmp_path / "n.onnx", external_data=False)
    with pytest.raises(UsageError):
        to_bytes(make_model())
    assert names(tmp_path) == {"m.onnx", "m.onnx.data"}


def test_replacing_uses_a_new_data_file_and_removes_the_old(tmp_path: Path) -> None:
    for number, expected in enumerate(["m.onnx.data", "m.onnx.1.data", "m.onnx.2.data", "m.onnx.1.data"]):
        model = make_model(scale=number + 1)
        save(model, tmp_path / "m.onnx", external_data=True)
        assert names(tmp_path) == {"m.onnx", expected}
        np.testing.assert_array_equal(
            weight(tmp_path / "m.onnx", "w"), model.graph.initializers["w"].const_value.numpy()
        )
    save(make_model(), tmp_path / "m.onnx")
    assert names(tmp_path) == {"m.onnx"}


def test_data_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"not ours")
    save(make_model(), tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").read_bytes() == b"not ours"
    assert names(tmp_path) == {"m.onnx", "m.onnx.data", "m.onnx.1.data"}


def test_input_is_never_overwritten(tmp_path: Path) -> None:
    save(make_model(), tmp_path / "m.onnx", external_data=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = ir.load(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="input"):
        save(model, tmp_path / "m.onnx", external_data=True)
    with pytest.raises(UsageError, match="input"):
        save(model, tmp_path / "m.onnx.data")
    (tmp_path / "link.onnx").symlink_to("m.onnx")
    with pytest.raises(UsageError, match="input"):
        save(model, tmp_path / "link.onnx")
    model = make_model()
    model.meta[write.SOURCE_PATH] = str(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="input"):
        save(model, tmp_path / "sub" / ".." / "m.onnx" if (tmp_path / "sub").mkdir() else tmp_path / "m.onnx")
    (tmp_path / "link.onnx").unlink()
    (tmp_path / "sub").rmdir()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_external_weights_are_copied_without_being_loaded(tmp_path: Path) -> None:
    """30 MB of external weights, copied by a process that may hold only 10 MB of data more than it has."""
    save(make_model(rows=250_000), tmp_path / "m.onnx", external_data=True)
    code = """
        import onnx_ir as ir, sys
        from xform.graph.write import save
        def anonymous():
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
        model = ir.load(sys.argv[1])
        before, size = anonymous(), sum(v.const_value.nbytes for v in model.graph.initializers.values())
        save(model, sys.argv[2], external_data=True)
        assert size > 30e6, size
        assert anonymous() - before < 10e6, anonymous() - before
    """
    run(code, tmp_path / "m.onnx", tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx.data").read_bytes() == (tmp_path / "m.onnx.data").read_bytes()


def run(code: str, *args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("external", [False, True])
def test_full_disk_leaves_nothing(tmp_path: Path, external: bool) -> None:
    """A file size limit acts like a full disk, and needs no rights."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(OutputError) as caught:
            save(make_model(), tmp_path / "m.onnx", external_data=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.exit_code == 2
    assert names(tmp_path) == set()


def test_full_file_system(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs more rights")
    try:
        for external in (False, True):
            with pytest.raises(OutputError, match="disk is full"):
                save(make_model(rows=4096), mount / "m.onnx", external_data=external)
            assert names(mount) == set()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_bad_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, words in [
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "m.onnx", "does not exist"),
        (tmp_path / "file" / "m.onnx", "is a file"),
        (Path("/dev/null"), "not a regular file"),
    ]:
        with pytest.raises(OutputError, match=words) as caught:
            save(make_model(), path)
        assert caught.value.exit_code == 2
    assert names(tmp_path) == {"file"}


def test_folder_without_rights() -> None:
    folder = Path("/sys/kernel")  # nobody creates files there, not even root
    if not folder.is_dir():
        pytest.skip("no sysfs here")
    with pytest.raises(OutputError, match=r"right|read-only"):
        save(make_model(), folder / "m.onnx")


def save_in_dying_process(model: ir.Model, path: Path, external: bool, steps: int) -> int:
    """Save in a forked process that kills itself before its `steps`-th step on the disk; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = steps

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    try:
        os.replace, os.fsync, Path.unlink = dying(os.replace), dying(os.fsync), dying(Path.unlink)  # type: ignore
        write._stream = dying(write._stream)
        save(model, path, external_data=external)
        os._exit(0)
    finally:
        os._exit(9)


@pytest.mark.parametrize("external", [False, True])
def test_killed_at_any_step_leaves_the_old_or_the_new_model(tmp_path: Path, external: bool) -> None:
    old, new = make_model(1.0), make_model(2.0)
    expected = {m: m.graph.initializers["w"].const_value.numpy().tobytes() for m in (old, new)}
    seen = set()
    for steps in range(20):
        save(old, tmp_path / "m.onnx", external_data=external)
        code = save_in_dying_process(new, tmp_path / "m.onnx", external, steps)
        assert code in (0, -signal.SIGKILL)
        found = weight(tmp_path / "m.onnx", "w").tobytes()
        assert found in expected.values(), f"a broken model after {steps} steps"
        seen.add((code, found == expected[new]))
        if code == 0:
            break
    assert seen >= {(-signal.SIGKILL, False), (-signal.SIGKILL, True), (0, True)}
    save(new, tmp_path / "m.onnx", external_data=external)
    assert len(names(tmp_path)) == 1 + external, "leftovers were not cleaned up"


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from xform.graph.atomic import Staged
        with Staged(Path(sys.argv[1])):
            print("writing", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        save(make_model(), tmp_path / "m.onnx")
        assert f".m.onnx.{writer.pid}.xform-tmp" in names(tmp_path)
        writer.kill()
    save(make_model(), tmp_path / "m.onnx")
    assert names(tmp_path) == {"m.onnx"}


def test_mode_of_a_replaced_file_is_kept(tmp_path: Path) -> None:
    save(make_model(), tmp_path / "m.onnx")
    os.chmod(tmp_path / "m.onnx", 0o640)
    save(make_model(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_mode & 0o777 == 0o640


def test_skeleton_has_no_weights() -> None:
    model = make_model()
    proto = skeleton(model)
    assert len(proto.SerializeToString()) < 2000
    assert list(proto.graph.initializer[0].dims) == [64, 32]


def test_subgraph_weights(tmp_path: Path) -> None:
    big = onnx.numpy_helper.from_array(RANDOM.standard_normal((40, 40)).astype(np.float32), "inner_w")
    value = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 40])
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "inner_w"], ["z"])], "b", [], [value], [big])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [
        helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 40]),
    ]
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 40])]
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    for external in (False, True):
        save(model, tmp_path / "m.onnx", external_data=external)
        onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
        found = [g for g in ir.load(tmp_path / "m.onnx").graphs() if "inner_w" in g.initializers]
        assert len(found) == 2
    assert (tmp_path / "m.onnx.data").stat().st_size >= 6400


def test_write_bytes(tmp_path: Path) -> None:
    write_bytes(tmp_path / "report.json", b"{}")
    assert (tmp_path / "report.json").read_bytes() == b"{}"
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "none" / "report.json", b"{}")
