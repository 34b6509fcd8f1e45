from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cli_support import Run
from support import declared, floats, parse

TEXT = """
    g (int64[2,5] ids) => (float[2,5,8] y) {
        e = Gather(table, ids)
        x = Add(e, pos)
        y = LayerNormalization<axis=-1>(x, scale)
    }"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    constants = {"table": floats(11, 8), "pos": floats(1, 5, 8), "scale": np.ones(8, np.float32) * 2}
    target = tmp_path / "model.onnx"
    ir.save(parse(declared(TEXT, constants), constants), target)
    return target


def test_streams_are_drawn(xform: Run, path: Path) -> None:
    result = xform("inspect", path, "--streams")
    assert result.code == 0
    assert "stream 1: 8 channels, 1 sums, read by 1 layer_norm" in result.out
    assert result.out.count("  + constant") == 2


def test_streams_as_data(xform: Run, path: Path) -> None:
    (stream,) = xform("inspect", path, "--streams", "--json").json["streams"]
    assert stream["channels"] == 8
    assert [reader["kind"] for reader in stream["readers"]] == ["layer_norm"]
