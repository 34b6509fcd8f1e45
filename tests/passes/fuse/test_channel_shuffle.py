from __future__ import annotations

import itertools

import numpy as np
import pytest
from support import applied, declared, floats, missed, ops, rewritten

from xform.passes.fuse import AbsorbChannelShuffle, SplitChannelMultiplier
from xform.rewrite.passes import PassContext
from xform.target import Target

C = 8


def split(text: str, used: dict[str, np.ndarray], *passes, feeds=None, x=(2, C, 7, 6)):
    return rewritten(
        declared(text, used), used, feeds or {"x": floats(*x)}, *(passes or (SplitChannelMultiplier(),)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("times", "stride", "bias", "size"), [*itertools.product((2, 3), (1, 2), (True, False), (3,)), (4, 1, True, 1)]
)
def test_multiplier_becomes_depthwise_parts_and_a_shuffle(times: int, stride: int, bias: bool, size: int) -> None:
    used = {"w": floats(times * C, 1, size, size), **({"b": floats(times * C)} if bias else {})}
    text = f"""g (float[2,8,7,6] x) => (float[2,?,?,?] y) {{
        y = Conv<group=8, strides=[{stride},{stride}], pads=[1,0,1,0]>(x, w{", b" if bias else ""}) }}"""
    model, remarks = split(text, used)
    assert applied(remarks, "split_multiplier") == 1
    assert ops(model) == ["Conv"] * times + ["Concat", "Reshape", "Transpose", "Reshape"]
    assert model.graph.outputs[0].name == "y"


def test_one_dimensional_and_dynamic_batch() -> None:
    used = {"w": floats(2 * C, 1, 3)}
    text = "g (float[N,8,11] x) => (float[N,16,9] y) { y = Conv<group=8>(x, w) }"
    _, remarks = split(text, used, x=(3, C, 11))
    assert applied(remarks, "split_multiplier") == 1


@pytest.mark.parametrize(
    ("x", "y", "group", "weight", "reason"),
    [
        ("2,8,7,6", "2,8,5,4", 8, (8, 1, 3, 3), None),  # one output per channel already
        ("2,8,7,6", "2,16,5,4", 4, (16, 2, 3, 3), None),
        ("2,8,7,6", "2,16,5,4", 1, (16, 8, 3, 3), None),
        ("2,8,H,W", "2,16,?,?", 8, (16, 1, 3, 3), "unknown"),
        ("2,8,7,6", "2,64,5,4", 8, (64, 1, 3, 3), "8 outputs"),
    ],
)
def test_left_alone(x: str, y: str, group: int, weight: tuple[int, ...], reason: str | None) -> None:
    used = {"w": floats(*weight)}
    model, remarks = split(f"g (float[{x}] x) => (float[{y}] y) {{ y = Conv<group={group}>(x, w) }}", used)
    assert ops(model) == ["Conv"]
    assert [reason in r for r in missed(remarks)] == [True] if reason else not missed(remarks)


def test_computed_weights_are_left_alone() -> None:
    text = "g (float[2,8,7,6] x, float[16,1,3,3] w) => (float[2,16,5,4] y) { y = Conv<group=8>(x, w) }"
    feeds = {"x": floats(2, C, 7, 6), "w": floats(16, 1, 3, 3)}
    model, remarks = rewritten(text, {}, feeds, SplitChannelMultiplier())
    assert ops(model) == ["Conv"]
    assert "computed" in missed(remarks)[0]


def test_only_on_the_cpu() -> None:
    from support import parse

    used = {"w": floats(16, 1, 3, 3)}
    model = parse(declared("g (float[2,8,7,6] x) => (float[2,16,5,4] y) { y = Conv<group=8>(x, w) }", used), used)
    context = PassContext(target=Target("cuda"))
    assert not SplitChannelMultiplier().run(model, context)
    assert "CPU only" in missed(context.remarks)[0]


@pytest.mark.parametrize("between", ["v = Identity(z)", "v = Gelu(z)", "u = Relu(z)\n v = Conv<group=24>(u, k, d)"])
def test_shuffle_moves_into_the_next_convolution(between: str) -> None:
    used = {"w": floats(3 * C, 1, 3, 3), "b": floats(3 * C), "p": floats(5, 3 * C, 1, 2), "q": floats(5),
            "k": floats(3 * C, 1, 2, 2), "d": floats(3 * C)}  # fmt: skip
    used = {k: v for k, v in used.items() if k not in "kd" or "group=24" in between}
    text = f"""g (float[2,8,7,6] x) => (float[2,5,?,?] y) {{
        z = Conv<group=8>(x, w, b)
        {between}
        y = Conv(v, p, q) }}"""
    model, remarks = split(text, used, SplitChannelMultiplier(), AbsorbChannelShuffle())
    assert applied(remarks, "into_convolution") == 1
    assert "Transpose" not in _alive(model)


def _alive(model) -> list[str]:
    from xform.passes.cleanup import RemoveDeadCode

    RemoveDeadCode().run(model, PassContext())
    return ops(model)


SHUFFLE = "r = Reshape(x, grid)\n t = Transpose<perm=[0,2,1,3,4]>(r)\n s = Reshape(t, flat)"
GRID = {"grid": np.array([2, 4, 2, 7, 6]), "flat": np.array([2, 8, 7, 6])}


@pytest.mark.parametrize(
    ("body", "outputs", "fires"),
    [
        ("y = Conv(s, p)", "float[2,5,7,6] y", 1),
        ("a = Relu(s)\n y = Conv(a, p)\n z = Relu(s)", "float[2,5,7,6] y, float[2,8,7,6] z", 1),  # stays for the other
        ("z = Relu(s)\n y = Conv(z, p)", "float[2,5,7,6] y, float[2,8,7,6] z", 0),  # in between, and an output
        ("z = Conv<group=2>(s, h)\n y = Conv(z, p)", "float[2,5,7,6] y", 0),  # sees half of the channels
        ("z = Add(s, x)\n y = Conv(z, p)", "float[2,5,7,6] y", 0),
    ],
)
def test_shuffle_and_its_readers(body: str, outputs: str, fires: int) -> None:
    used = {**GRID, "p": floats(5, 8, 1, 1), "h": floats(8, 4, 1, 1)}
    used = {k: v for k, v in used.items() if k != "h" or "h)" in body}
    text = f"g (float[2,8,7,6] x) => ({outputs}) {{ {SHUFFLE}\n {body} }}"
    _, remarks = split(text, used, AbsorbChannelShuffle())
    assert applied(remarks, "into_convolution") == fires


@pytest.mark.parametrize(
    ("grid", "perm", "flat"),
    [
        ([2, 4, 2, 7, 6], [0, 1, 2, 4, 3], [2, 8, 7, 6]),  # swaps space
        ([2, 4, 14, 6], [0, 2, 1, 3], [2, 8, 7, 6]),  # the grid is not of channels alone
        ([4, 4, 7, 6], [0, 2, 1, 3], [2, 8, 7, 6]),  # nor is this
    ],
)
def test_what_is_no_shuffle(grid: list[int], perm: list[int], flat: list[int]) -> None:
    used = {"grid": np.array(grid), "flat": np.array(flat), "p": floats(5, 8, 1, 1)}
    text = f"""g (float[2,8,7,6] x) => (float[2,5,7,6] y) {{
        r = Reshape(x, grid)
        t = Transpose<perm={perm}>(r)
        s = Reshape(t, flat)
        y = Conv(s, p) }}"""
    _, remarks = split(text, used, AbsorbChannelShuffle())
    assert applied(remarks, "into_convolution") == 0


def test_a_computed_weight_keeps_the_shuffle() -> None:
    text = f"g (float[2,8,7,6] x, float[5,8,1,1] p) => (float[2,5,7,6] y) {{ {SHUFFLE}\n y = Conv(s, p) }}"
    feeds = {"x": floats(2, 8, 7, 6), "p": floats(5, 8, 1, 1)}
    _, remarks = rewritten(declared(text, GRID), GRID, feeds, AbsorbChannelShuffle())
    assert applied(remarks, "into_convolution") == 0
    assert "computed" in missed(remarks)[0]
