"""Products of one input become one where that is faster; nothing is held twice, and nothing stays that nobody reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from support import floats, parse

from xform.backends.base import LowerOptions
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
    m = MatMul(x, q) s = Add(m, bq) a = Relu(s) t = MatMul(x, k) b = Relu(t) n = MatMul(x, v) u = Add(n, bv)
    c = Relu(u) }"""
)
X = torch.from_numpy(floats(2, 3, 8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Clock:
    """The first of two ways, apart, takes 1.0, and one product as long as is said."""

    def __init__(self, one: float = 0.5) -> None:
        self.one = one
        self.given: list[tuple[str, tuple[Any, ...]]] = []

    def __call__(self, function: Any, arguments: tuple[Any, ...]) -> float:
        self.given.append((function.__name__, arguments))
        function(*arguments)
        return {"_separate": 1.0, "_packed": self.one}[function.__name__]


def made(text: str, weights: dict[str, Any]) -> torch.fx.GraphModule:
    module = to_torch(parse(text, {name: array.copy() for name, array in weights.items()}))
    fuse(module)
    return module


def products(module: torch.fx.GraphModule) -> int:
    return module.code.count("linear(") + module.code.count(" @ ")


def equal(module: torch.fx.GraphModule, want: Any) -> None:
    for got, wanted in zip(module(X), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_three_become_one_parameter() -> None:
    module = made(THREE, WEIGHTS)
    assert products(module) == 3
    want = module(X)
    (line,) = pack(module, [X], Clock())
    assert line["packed"] and line["widths"] == [6, 4, 4] and line["shape"] == [2, 3, 8]
    assert products(module) == 1 and "split(" in module.code
    equal(module, want)
    weights = torch.cat([torch.from_numpy(WEIGHTS[name]) for name in ("q", "k", "v")], 1)
    biases = torch.cat((torch.from_numpy(WEIGHTS["bq"]), torch.zeros(4), torch.from_numpy(WEIGHTS["bv"])))
    state = module.state_dict()
    assert set(state) == {"q_packed", "q_packed_bias"}
    assert torch.equal(state["q_packed"], weights) and torch.equal(state["q_packed_bias"], biases)


def test_a_weight_that_something_else_reads_is_not_held_twice() -> None:
    module = made(THREE, WEIGHTS)
    weight = next(node for node in module.graph.nodes if node.op == "get_attr" and node.target == "k")
    output = module.graph.output_node()
    output.args = ((*output.args[0], weight),)
    module.recompile()
    pack(module, [X], Clock())
    state = module.state_dict()
    assert set(state) == {"k", "q_packed", "q_packed_bias"}
    assert state["k"].untyped_storage().data_ptr() == state["q_packed"].untyped_storage().data_ptr()
    assert torch.equal(module(X)[-1], torch.from_numpy(WEIGHTS["k"]))


@pytest.mark.parametrize("one", [0.99, 1.0, 3.0])
def test_what_gains_nothing_stays_apart(one: float) -> None:
    module = made(THREE, WEIGHTS)
    code, memory = module.code, {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    (line,) = pack(module, [X], Clock(one))
    assert not line["packed"] and module.code == code
    assert memory == {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


def test_it_is_said_where_and_by_how_much() -> None:
    (choice,) = as_choices(pack(made(THREE, WEIGHTS), [X], Clock()))
    assert choice.applied and (choice.rule, choice.concept) == ("packed_products", "linear")
    assert sorted(choice.nodes) == ["m", "n", "s", "t", "u"]
    assert "500000.0 us, 3 of them 1000000.0 us on 2x3x8" in choice.reason and "gains nothing" not in choice.reason
    (choice,) = as_choices(pack(made(THREE, WEIGHTS), [X[:1]], Clock(2.0)))
    assert not choice.applied and "they stay apart" in choice.reason


def test_without_memory_for_a_copy_they_stay_apart() -> None:
    def full(function: Any, arguments: tuple[Any, ...]) -> float:
        if function.__name__ == "_packed":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    module = made(THREE, WEIGHTS)
    code = module.code
    (choice,) = as_choices(pack(module, [X], full))
    assert not choice.applied and "no memory" in choice.reason and module.code == code
    (line,) = pack(module, [X], Clock())
    assert line["packed"]  # it is not remembered


def test_decisions_are_remembered_by_shape() -> None:
    pack(made(THREE, WEIGHTS), [X], Clock())
    again, clock = made(THREE, WEIGHTS), Clock(2.0)
    assert pack(again, [X], clock)[0]["packed"] and not clock.given
    text = THREE.replace("float[8,4] v", "float[8,5] v").replace("float[4] bv", "float[5] bv").replace("4] c", "5] c")
    wider = made(text, {**WEIGHTS, "v": floats(8, 5), "bv": floats(5)})
    without_bias = made(THREE.replace("u = Add(n, bv)", "u = Neg(n)"), WEIGHTS)
    for module, x in ((made(THREE, WEIGHTS), X[:1]), (wider, X), (without_bias, X)):
        clock = Clock(2.0)
        assert not pack(module, [x], clock)[0]["packed"] and len(clock.given) == 2


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
    equal(module, want)


def test_layers_that_share_their_weights_share_the_packed_one() -> None:
    text = """g (float[2,3,8] x, float[8,8] q, float[8,8] k) => (float[2,3,8] z) {
        m = MatMul(x, q) n = MatMul(x, k) s = Mul(m, n) a = MatMul(s, q) b = MatMul(s, k) z = Add(a, b) }"""
    module = made(text, {"q": floats(8, 8), "k": floats(8, 8)})
    want = module(X)
    assert [line["packed"] for line in pack(module, [X], Clock())] == [True, True]
    assert products(module) == 2 and set(module.state_dict()) == {"q_packed"}
    equal(module, want)


def test_what_a_norm_reads_is_timed_as_it_reads_it() -> None:
    """torch's norms make a part of a wider result dense first: queries and keys that are normalized head by head."""
    text = """g (float[2,3,8] x, float[8,6] q, float[8,4] k, float[8,4] v, float[2] w, int64[4] s) =>
        (float z, float y) { m = MatMul(x, q) r = Reshape(m, s) a = RMSNormalization(r, w) n = MatMul(x, k)
        u = MatMul(x, v) y = Relu(a) z = Add(n, u) }"""
    weights = {name: WEIGHTS[name] for name in ("q", "k", "v")} | {"w": floats(2), "s": np.array([2, 3, 3, 2])}
    module, clock = made(text, weights), Clock()
    want = module(X)
    pack(module, [X], clock)
    (arguments,) = [arguments for name, arguments in clock.given if name == "_packed"]
    assert arguments[-1] == (True, False, False)
    equal(module, want)


ALONE = {
    "one product": "m = MatMul(x, q) s = Add(m, bq) a = Relu(s) b = Relu(x)",
    "one weight": "m = MatMul(x, q) n = MatMul(x, q) a = Relu(m) b = Abs(n)",
    "a bias for a kernel": "m = MatMul(x, q) s = Add(m, bq) a = Gelu(s) n = MatMul(x, k) b = Relu(n)",
    "two inputs": "y = Relu(x) m = MatMul(x, q) n = MatMul(y, k) a = Relu(m) b = Relu(n)",
    "no weights": "t = Transpose<perm = [0, 2, 1]>(x) m = MatMul(x, t) n = MatMul(x, q) a = Relu(m) b = Relu(n)",
    "given out": "a = MatMul(x, q) n = MatMul(x, k) b = Relu(n)",
    "apart": "m = MatMul(x, q) y = Relu(x) a = MatMul(y, v) n = MatMul(x, k) b = Add(m, n)",
}


@pytest.mark.parametrize("body", ALONE.values(), ids=ALONE)
def test_what_is_no_group_is_not_timed(body: str) -> None:
    text = HEAD + f"(float a, float b) {{ {body} }}"
    text, weights = text.replace("float[8,6] q", "float[8,4] q"), {**WEIGHTS, "q": floats(8, 4), "bq": floats(4)}
    module, clock = made(text.replace("float[6] bq", "float[4] bq"), weights), Clock()
    code = module.code
    assert pack(module, [X], clock) == [] and not clock.given and module.code == code


def test_a_weight_is_packed_with_the_same_others_everywhere() -> None:
    """Else it would be kept twice. What stays apart by this rule keeps no other group from being packed."""
    head = HEAD.replace("float[8,4] v,", "float[8,4] v, float[8,5] w,")
    text = (
        head
        + """(float a, float b, float c) {
        m = MatMul(x, q) n = MatMul(x, k) a = Concat<axis = 2>(m, n) y = Relu(x) o = MatMul(y, v) p = MatMul(y, k)
        b = Add(o, p) z = Neg(x) r = MatMul(z, v) s = MatMul(z, w) c = Concat<axis = 2>(r, s) }"""
    )
    module = made(text, {**WEIGHTS, "w": floats(8, 5)})
    assert [line["widths"] for line in pack(module, [X], Clock())] == [[6, 4], [4, 5]] and products(module) == 4


def test_a_package_made_before_holds_what_one_made_after_does() -> None:
    artifact = TorchTritonBackend().lower(parse(THREE, dict(WEIGHTS)), Target("cpu"), LowerOptions())
    before = package._exported(artifact, torch.device("cpu"))
    fuse(artifact.module)
    pack(artifact.module, [X], Clock())
    after = package._exported(artifact, torch.device("cpu"))
    assert set(before.state_dict) == set(WEIGHTS) and set(after.state_dict) == {"q_packed", "q_packed_bias"}
    equal(artifact.module, before.module()(X))
    equal(artifact.module, after.module()(X))
