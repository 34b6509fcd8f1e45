"""External data of ONNX models: it stays on disk, inside the model's folder, and is checked."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx_support import X, assert_same, make_proto, refusal

from xform.capture.onnx_file import capture_onnx
from xform.graph.write import save


def external(folder: Path) -> Path:
    path = folder / "m.onnx"
    proto = make_proto()
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_external_data_stays_on_disk(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = capture_onnx(path)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    save(model, tmp_path / "out.onnx")
    loaded = onnx.load(path)
    assert_same(capture_onnx(tmp_path / "out.onnx"), loaded, X)


def test_external_data_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = capture_onnx("m.onnx")
    assert model.graph.initializers["w"].const_value.numpy().shape == (8, 8)


def redirect(path: Path, location: str, **others: str) -> Path:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            if entry.key in others:
                entry.value = others[entry.key]
    path.write_bytes(proto.SerializeToString())
    return path


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:100])
    assert "too short: 100 bytes" in refusal(path)
    (tmp_path / "m.data").unlink()
    message = refusal(path)
    assert "m.data" in message
    assert "initializer 'w'" in message
    (tmp_path / "m.data").mkdir()
    assert "not a readable file" in refusal(path)


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "models"
    inside.mkdir()
    path = external(inside)
    outside = tmp_path / "secret.data"
    outside.write_bytes((inside / "m.data").read_bytes())
    for location in ("../secret.data", str(outside), "sub/../../secret.data", "..\\secret.data", "C:\\secret.data", ""):
        message = refusal(redirect(path, location))
        assert "external data path" in message, location
    (inside / "link.data").symlink_to(outside)
    assert "link that leaves" in refusal(redirect(path, "link.data"))
    (inside / "folder").symlink_to(tmp_path)
    assert "link that leaves" in refusal(redirect(path, "folder/secret.data"))
    os.link(outside, inside / "hard.data")
    assert "hard link" in refusal(redirect(path, "hard.data"))
    (inside / "fine.data").symlink_to("m.data")
    assert len(list(capture_onnx(redirect(path, "fine.data")).graph)) == 3


def test_nonsense_in_external_data_entries(tmp_path: Path) -> None:
    for others in ({"offset": "-8"}, {"offset": "x"}, {"length": "3"}, {"offset": str(10**15)}):
        message = refusal(redirect(external(tmp_path), "m.data", **others))
        assert "external data" in message, others


def test_external_data_needs_a_file(tmp_path: Path) -> None:
    path = external(tmp_path)
    assert "not given as a file" in refusal(path.read_bytes())
    assert "not given as a file" in refusal(onnx.load(path, load_external_data=False))


@pytest.mark.parametrize("key", ["location", "offset"])
def test_entries_that_are_given_twice(tmp_path: Path, key: str) -> None:
    """One reader takes the first, another the last."""
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    entries = proto.graph.initializer[0].external_data
    kept = [(entry.key, entry.value) for entry in entries]
    del entries[:]
    for name, value in [(key, "../other.bin" if key == "location" else "4096"), *kept]:
        entries.add(key=name, value=value)
    path.write_bytes(proto.SerializeToString())
    assert f"gives its '{key}' twice" in refusal(path)
