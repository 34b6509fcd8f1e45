from __future__ import annotations

import numpy as np
import pytest
from support import applied, declared, floats, missed, ops, parse, rewritten

from xform.passes.cleanup import SimplifyLayout
from xform.passes.fuse import PatchesToProducts
from xform.rewrite.passes import PassContext
from xform.target import Target

PRODUCT = ["Reshape", "Transpose", "Reshape", "MatMul", "Add", "Transpose", "Reshape"]


def patches(x: str, y: str, attributes: str, *weight: int, size: tuple[int, ...], bias: bool = True, **options: int):
    used = {"w": floats(*weight), **({"b": floats(weight[0])} if bias else {})}
    text = f"g (float[{x}] x) => (float[{y}] y) {{ y = Conv{attributes}(x, w{', b' if bias else ''}) }}"
    return rewritten(declared(text, used), used, {"x": floats(*size)}, PatchesToProducts(**options), atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("x", "y", "attributes", "weight", "size"),
    [
        ("2,3,24,32", "2,5,3,4", "<strides=[8,8]>", (5, 3, 8, 8), (2, 3, 24, 32)),
        ("N,3,16,45", "N,5,4,5", "<strides=[4,9], pads=[0,0,0,0], group=1>", (5, 3, 4, 9), (3, 3, 16, 45)),
        ("2,4,40", "2,6,4", "<strides=[10], auto_pad=\"VALID\", kernel_shape=[10]>", (6, 4, 10), (2, 4, 40)),
        ("2,2,4,6,16", "2,7,2,2,2", "<strides=[2,3,8]>", (7, 2, 2, 3, 8), (2, 2, 4, 6, 16)),
        ("1,3,8,8", "1,5,1,1", "<strides=[8,8]>", (5, 3, 8, 8), (1, 3, 8, 8)),
    ],
)  # fmt: skip
def test_patches_become_rows_of_a_product(
    x: str, y: str, attributes: str, weight: tuple[int, ...], size: tuple[int, ...], bias: bool
) -> None:
    model, remarks = patches(x, y, attributes, *weight, size=size, bias=bias)
    assert applied(remarks, "patches") == 1
    assert ops(model) == [op for op in PRODUCT if bias or op != "Add"]


@pytest.mark.parametrize(
    ("x", "y", "attributes", "weight", "reason"),
    [
        ("2,3,20,32", "2,5,2,4", "<strides=[8,8]>", (5, 3, 8, 8), "whole patches of [8, 8]"),
        ("2,3,H,32", "2,5,?,4", "<strides=[8,8]>", (5, 3, 8, 8), "unknown"),
        ("2,3,24,32", "2,5,6,8", "<strides=[4,4]>", (5, 3, 4, 4), "patches 4 wide"),
        ("2,3,24,32", "2,5,?,?", "<strides=[4,4]>", (5, 3, 8, 8), None),  # they overlap
        ("2,3,24,32", "2,5,?,?", "<strides=[8,8], dilations=[2,1]>", (5, 3, 8, 8), None),
        ("2,3,24,32", "2,5,?,?", "<strides=[8,8], pads=[8,0,0,0]>", (5, 3, 8, 8), None),
        ("2,3,24,32", "2,5,?,?", "<strides=[8,8], auto_pad=\"SAME_UPPER\">", (5, 3, 8, 8), None),
        ("2,4,24,32", "2,6,3,4", "<strides=[8,8], group=2>", (6, 2, 8, 8), None),
        ("2,3,24,32", "2,5,24,32", "", (5, 3, 1, 1), None),  # pixels are rows already
    ],
)  # fmt: skip
def test_left_alone(x: str, y: str, attributes: str, weight: tuple[int, ...], reason: str | None) -> None:
    size = tuple(int(n) if n.isdigit() else 24 for n in x.split(","))
    model, remarks = patches(x, y, attributes, *weight, size=size)
    assert ops(model) == ["Conv"]
    assert [reason in found for found in missed(remarks)] == [True] if reason else not missed(remarks)


@pytest.mark.parametrize(("weight", "y"), [((0, 3, 8, 8), "2,0,2,2"), ((5, 0, 8, 8), "2,5,2,2")])
def test_without_channels_nothing_happens(weight: tuple[int, ...], y: str) -> None:
    used = {"w": np.zeros(weight, np.float32)}
    text = f"g (float[2,{weight[1]},16,16] x) => (float[{y}] y) {{ y = Conv<strides=[8,8]>(x, w) }}"
    assert not PatchesToProducts().run(parse(declared(text, used), used), PassContext())


def test_narrower_patches_on_demand() -> None:
    model, _ = patches("2,3,8,8", "2,5,2,2", "<strides=[4,4]>", 5, 3, 4, 4, size=(2, 3, 8, 8), narrowest=4)
    assert "Conv" not in ops(model)


def test_computed_weights_are_left_alone() -> None:
    text = "g (float[2,3,16,16] x, float[5,3,8,8] w) => (float[2,5,2,2] y) { y = Conv<strides=[8,8]>(x, w) }"
    model, remarks = rewritten(text, {}, {"x": floats(2, 3, 16, 16), "w": floats(5, 3, 8, 8)}, PatchesToProducts())
    assert ops(model) == ["Conv"]
    assert "computed" in missed(remarks)[0]


def test_only_on_the_cpu() -> None:
    used = {"w": floats(5, 3, 8, 8)}
    text = "g (float[2,3,16,16] x) => (float[2,5,2,2] y) { y = Conv<strides=[8,8]>(x, w) }"
    context = PassContext(target=Target("cuda"))
    assert not PatchesToProducts().run(parse(declared(text, used), used), context)
    assert "CPU only" in missed(context.remarks)[0]


def test_the_transpose_to_tokens_cancels() -> None:
    used = {"w": floats(5, 3, 8, 8), "b": floats(5), "s": np.array([0, 5, -1])}
    text = """g (float[N,3,16,24] x) => (float[N,6,5] t) {
        c = Conv<strides=[8,8]>(x, w, b)
        y = Reshape(c, s)
        t = Transpose<perm=[0,2,1]>(y) }"""
    feeds = {"x": floats(2, 3, 16, 24)}
    model, _ = rewritten(declared(text, used), used, feeds, PatchesToProducts(), SimplifyLayout(), atol=1e-4)
    assert ops(model) == ["Reshape", "Transpose", "Reshape", "MatMul", "Add"]
