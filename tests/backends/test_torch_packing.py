"""Products of one input become one where that is faster; weights keep their names and their memory does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support import floats, parse

from xform.backends.torch_triton import TorchTritonBackend, package
from xform.backends.torch_triton.fuse import fuse
from xform.backends.torch_triton.lower import to_torch
from xform.backends.torch_triton.packing import as_choices, pack
from xform.target import Target

WEIGHTS = {"q": floats(8, 6), "k": floats(8, 4), "v": floats(8, 4), "bq": floats(6), "bv": floats(4)}
HEAD = "g (float[2,3,8] x, float[8,6] q, float[8,4] k, float[8,4] v, float[6] bq, float[4] bv) => "
THREE = (
    HEAD
    + """(float[2,3,6] a, float[2,3,4] b, float[2,3,4] c) {
    m = MatMul(x, q) a = Add(m, bq) b = MatMul(x, k) n = MatMul(x, v) c = Add(n, bv) }"""
)
X = torch.from_numpy(floats(2, 3, 8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Clock:
    """One product takes as long as is said, several take 1.0."""

    def __init__(self, one: float = 0.5) -> None:
        self.one, self.calls = one, 0

    def __call__(self, function: Any, arguments: tuple[Any, ...]) -> float:
        self.calls += 1
        return 1.0 if isinstance(function(*arguments), list) else self.one


def made(text: str, weights: dict[str, Any]) -> torch.fx.GraphModule:
    module = to_torch(parse(text, {name: array.copy() for name, array in weights.items()}))
    fuse(module)
    return module


def products(module: torch.fx.GraphModule) -> int:
    return module.code.count("linear(") + module.code.count(" @ ")


def test_three_become_one_and_keep_their_names() -> None:
    module = made(THREE, WEIGHTS)
    assert products(module) == 3
    want, before = module(X), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    (line,) = pack(module, [X], Clock())
    assert line["packed"] and line["widths"] == [6, 4, 4] and line["shape"] == [2, 3, 8]
    assert products(module) == 1 and "split(" in module.code
    for got, wanted in zip(module(X), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    memory = {name: state[name].untyped_storage().data_ptr() for name in ("q", "k", "v", "q_packed")}
    assert len(set(memory.values())) == 1
    state["k"].zero_()
    assert not module(X)[1].any()


@pytest.mark.parametrize("one", [0.99, 1.0, 3.0])
def test_what_gains_nothing_stays_apart(one: float) -> None:
    module = made(THREE, WEIGHTS)
    code, memory = module.code, {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    (line,) = pack(module, [X], Clock(one))
    assert not line["packed"] and module.code == code
    assert memory == {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


def test_it_is_said_where_and_by_how_much() -> None:
    module = made(THREE, WEIGHTS)
    (choice,) = as_choices(pack(module, [X], Clock()))
    assert choice.applied and (choice.rule, choice.concept) == ("packed_products", "linear")
    assert sorted(choice.nodes) == ["a", "b", "c", "m", "n"]
    assert "500000.0 us, 3 of them 1000000.0 us on 2x3x8" in choice.reason and "gains nothing" not in choice.reason
    (choice,) = as_choices(pack(made(THREE, WEIGHTS), [X[:1]], Clock(2.0)))
    assert not choice.applied and "they stay apart" in choice.reason


def test_decisions_are_remembered_by_shape() -> None:
    pack(made(THREE, WEIGHTS), [X], Clock())
    again, clock = made(THREE, WEIGHTS), Clock(2.0)
    assert pack(again, [X], clock)[0]["packed"] and clock.calls == 0
    assert not pack(made(THREE, WEIGHTS), [X[:1]], clock)[0]["packed"] and clock.calls == 2


def test_columns_that_are_dense_stay_dense() -> None:
    """Weights as torch's Linear holds them, [N, K], seen transposed."""
    module = made(THREE, WEIGHTS)
    for name in ("q", "k", "v"):
        weight = module.get_parameter(name)
        weight.data = weight.data.t().contiguous().t()
    want = module(X)
    pack(module, [X], Clock())
    packed = module.state_dict()["q_packed"]
    assert packed.shape == (8, 14) and packed.stride() == (1, 8)
    for got, wanted in zip(module(X), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_layers_that_share_their_weights_share_the_packed_one() -> None:
    text = """g (float[2,3,8] x, float[8,8] q, float[8,8] k) => (float[2,3,8] a, float[2,3,8] b) {
        m = MatMul(x, q) n = MatMul(x, k) s = Mul(m, n) a = MatMul(s, q) b = MatMul(s, k) }"""
    module = made(text, {"q": floats(8, 8), "k": floats(8, 8)})
    want = module(X)
    assert [line["packed"] for line in pack(module, [X], Clock())] == [True, True]
    assert products(module) == 2 and [name for name in module.state_dict() if "packed" in name] == ["q_packed"]
    for got, wanted in zip(module(X), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


ALONE = {
    "one product": "m = MatMul(x, q) a = Add(m, bq) b = Relu(x)",
    "one weight": "a = MatMul(x, q) b = MatMul(x, q)",
    "a bias for a kernel": "m = MatMul(x, q) s = Add(m, bq) a = Gelu(s) b = MatMul(x, k)",
    "two inputs": "y = Relu(x) a = MatMul(x, q) b = MatMul(y, k)",
    "no weights": "t = Transpose<perm = [0, 2, 1]>(x) a = MatMul(x, t) b = MatMul(x, q)",
}


@pytest.mark.parametrize("body", ALONE.values(), ids=ALONE)
def test_what_is_no_group_is_not_timed(body: str) -> None:
    module = made(HEAD + f"(float a, float b) {{ {body} }}", WEIGHTS)
    code, clock = module.code, Clock()
    assert pack(module, [X], clock) == [] and clock.calls == 0 and module.code == code


def test_a_weight_is_packed_with_the_same_others_everywhere() -> None:
    """Else it would be kept twice. What stays apart by this rule keeps no other group from being packed."""
    head = HEAD.replace("float[8,4] v,", "float[8,4] v, float[8,5] w,")
    text = (
        head
        + """(float a, float b, float c, float d, float e, float f) {
        a = MatMul(x, q) b = MatMul(x, k) y = Relu(x) c = MatMul(y, v) d = MatMul(y, k) z = Neg(x) e = MatMul(z, v)
        f = MatMul(z, w) }"""
    )
    module = made(text, {**WEIGHTS, "w": floats(8, 5)})
    assert [line["widths"] for line in pack(module, [X], Clock())] == [[6, 4], [4, 5]] and products(module) == 4


def test_a_package_holds_each_weight_once() -> None:
    from xform.backends.base import LowerOptions

    artifact = TorchTritonBackend().lower(parse(THREE, dict(WEIGHTS)), Target("cpu"), LowerOptions())
    pack(artifact.module, [X], Clock())
    exported = package._exported(artifact, torch.device("cpu"))
    assert {"q_packed"} <= set(exported.state_dict) and not {"q", "k", "v"} & set(exported.state_dict)
    for got, wanted in zip(exported.module()(X), artifact.module(X), strict=True):
        torch.testing.assert_close(got, wanted)
