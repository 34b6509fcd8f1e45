"""Reading `--set PASS.OPTION=VALUE`, `--dynamic`, `--size` and `--inputs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest

from xform.cli.common import parse_dynamic, parse_sizes, read_inputs, split_names
from xform.cli.pass_options import convert, option_type, parse_settings
from xform.errors import UsageError
from xform.passes import PASSES
from xform.rewrite.passes import Pass, PassContext


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with an option of each type."""

    name: ClassVar[str] = "sample"
    count: int = 1
    ratio: float = 0.5
    deep: bool = False
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    names: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: PassContext) -> bool:
        return False


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "sample", Sample)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=1024", 1024),
        ("ratio=1e-3", 1e-3),
        ("ratio=2", 2.0),
        ("deep=true", True),
        ("deep=off", False),
        ("mode=b", "b"),
        ("limit=none", None),
        ("limit=7", 7),
        ("names=x, y", ("x", "y")),
        ("names=", ()),
    ],
)
def test_values_take_the_declared_type(text: str, expected: object) -> None:
    option = text.partition("=")[0]
    assert parse_settings([f"sample.{text}"]) == {"sample": {option: expected}}


@pytest.mark.parametrize("text", ["count=1.5", "count=", "ratio=fast", "deep=maybe", "mode=c", "limit=x"])
def test_values_of_another_type_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not of type"):
        parse_settings([f"sample.{text}"])


@pytest.mark.parametrize("text", ["count=1", "sample.count", "sample=1", ""])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(UsageError, match=r"PASS\.OPTION=VALUE"):
        parse_settings([text])


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'sample'"):
        parse_settings(["sampel.count=1"])
    with pytest.raises(UsageError, match="did you mean 'count'"):
        parse_settings(["sample.cuont=1"])


def test_text_comes_last_in_a_union() -> None:
    assert convert("3", int | str, "") == 3
    assert convert("three", int | str, "") == "three"


def test_dynamic() -> None:
    assert parse_dynamic(None) is None
    assert parse_dynamic(["auto"]) == "auto"
    assert parse_dynamic(["batch=1:8", "seq=16:16"]) == {"batch": (1, 8), "seq": (16, 16)}


@pytest.mark.parametrize("text", ["batch", "batch=8", "batch=8:1", "batch=a:b"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError):
        parse_dynamic([text])


def test_sizes_of_dims() -> None:
    assert parse_sizes(["batch=4"]) == {"batch": 4}
    assert parse_sizes([]) is None
    with pytest.raises(UsageError):
        parse_sizes(["batch=-4"])


def test_split_names() -> None:
    assert split_names(" a, b ,") == ["a", "b"]
    assert split_names(None) is None


def test_inputs_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3), np.float32))
    inputs = read_inputs(tmp_path / "x.npz")
    assert inputs is not None and inputs["x"].shape == (2, 3)
    assert read_inputs(None) is None


def _pickled(path: Path) -> None:
    objects: Any = np.array([{"a": 1}], dtype=object)
    np.savez(path, x=objects)


def _plain_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 truncated"),
        _plain_array,
        _pickled,
    ],
    ids=["absent", "empty", "truncated", "npy", "pickled"],
)
def test_inputs_that_cannot_be_read_are_a_usage_error(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(UsageError, match=r"numpy\.savez"):
        read_inputs(path)


@pytest.mark.parametrize("option", ["name", "fidelity", "foo"])
def test_what_belongs_to_the_class_of_a_pass_is_not_an_option(option: str) -> None:
    with pytest.raises(UsageError, match=f"has no option '{option}'") as caught:
        option_type("raise_gelu", option)
    assert caught.value.hint == "it has no options"
