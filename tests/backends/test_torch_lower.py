"""Lowering of ONNX graphs to torch modules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import floats, parse, run

from xform.backends.torch_triton.lower import to_torch
from xform.errors import TargetError


def outputs(model: ir.Model, feeds: Mapping[str, np.ndarray], **options: object) -> list[np.ndarray]:
    with torch.no_grad():
        found = to_torch(model, **options)(*(torch.from_numpy(feeds[v.name]) for v in model.graph.inputs))
    return [value.numpy() for value in found]


def check(text: str, feeds: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray] | None = None) -> None:
    """The module gives the numbers of ONNX Runtime."""
    model = parse(text, constants)
    for got, want in zip(outputs(model, feeds), run(model, feeds), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_an_unknown_operator_is_refused_with_all_its_nodes() -> None:
    text = """g (float[2] x) => (float[2] z) {
        a = com.microsoft.NoSuch(x)  b = com.microsoft.NoSuch(a)  c =
        TfIdfVectorizer<max_gram_length=1,max_skip_count=0,
        min_gram_length=1,mode="TF",ngram_counts=[0],ngram_indexes=[0]>(b)  z = Add(b, c) }"""
    model = parse(text)
    for number, node in enumerate(model.graph):
        node.name = f"node_{number}"
    with pytest.raises(TargetError, match=r"TfIdfVectorizer, com\.microsoft::NoSuch") as raised:
        to_torch(model)
    assert raised.value.where == ("node_0", "node_1", "node_2")


def test_options_that_torch_lacks_are_refused_together() -> None:
    text = """g (float[1,2] x) => (float[1,2] z) {
        a = LpNormalization<p=2>(x)  b = Cast<to=21>(a)  c = Cast<to=22>(a)  d = Cast<to=1>(b)  e = Cast<to=1>(c)  z
        = Add(d, e) }"""
    with pytest.raises(TargetError, match=r"2 node\(s\): Cast \(torch has no int4\); Cast \(torch has no uint4\)"):
        to_torch(parse(text))


def test_weights_keep_their_names_and_share_memory() -> None:
    weight = floats(4, 3)
    model = parse("g (float[2,4] x, float[4,3] w) => (float[2,3] z) { z = MatMul(x, w) }", {"w": weight})
    value = model.graph.initializers.pop("w")
    value.name = "block.0.proj.weight"
    model.graph.register_initializer(value)
    module = to_torch(model)
    (name, parameter), *rest = module.named_parameters()
    assert name == "block.0.proj.weight" and not rest
    assert parameter.data_ptr() == value.const_value.numpy().ctypes.data


def test_names_that_collide_with_modules_are_told_apart() -> None:
    model = parse(
        "g (float[3] x, float[3] a, float[3] b) => (float[3] z) { y = Add(x, a) z = Mul(y, b) }",
        {"a": floats(3), "b": floats(3)},
    )
    for old, new in (("a", "w"), ("b", "w.scale")):
        value = model.graph.initializers.pop(old)
        value.name = new
        model.graph.register_initializer(value)
    feeds = {"x": floats(3)}
    np.testing.assert_allclose(outputs(model, feeds)[0], run(model, feeds)[0], rtol=1e-6)


def test_sizes_stay_python_numbers() -> None:
    """One module serves every batch and length, and the shape arithmetic makes no tensors."""
    text = """g (float[b,s,6] x) => (float[b,t,3] z) {
        shape = Shape(x)  zero = Constant<value_ints=[0]>()  one = Constant<value_ints=[1]>()  two =
        Constant<value_ints=[2]>()
        b = Gather(shape, zero)  s = Gather(shape, one)  t = Mul(s, two)  three = Constant<value_ints=[3]>()
        target = Concat<axis=0>(b, t, three)  z = Reshape(x, target) }"""
    model = parse(text)
    module = to_torch(model)
    assert "tensor(" not in module.code and "tolist" not in module.code
    for shape in ((1, 1, 6), (2, 5, 6)):
        x = floats(*shape)
        np.testing.assert_array_equal(module(torch.from_numpy(x))[0].numpy(), run(model, {"x": x})[0])
    exported = torch.export.export(
        module, (torch.randn(2, 5, 6),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    )
    assert exported.module()(torch.randn(3, 7, 6))[0].shape == (3, 14, 3)


def test_it_is_differentiable() -> None:
    model = parse(
        "g (float[2,4] x, float[4,3] w, float[3] s) => (float[2,3] z) {"
        " y = MatMul(x, w) n = RMSNormalization(y, s) z = Gelu(n) }",
        {"w": floats(4, 3), "s": floats(3)},
    )
    module = to_torch(model, dtype=torch.float64).requires_grad_()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: module(value)[0], (x,))
    module(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_gelu_is_as_exact_as_float32_is() -> None:
    """torch's own is off by 1.2e-6 around 3.5 on processors with vectors, which some networks amplify to 1e-5."""
    x = torch.linspace(-9, 9, 100_001)
    gelu = to_torch(parse("g (float[n] x) => (float[n] y) { y = Gelu(x) }"))
    want = torch.nn.functional.gelu(x.double())
    assert (gelu(x)[0].double() - want).abs().max() < 5e-7
    for other in (torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(gelu(x.to(other))[0], torch.nn.functional.gelu(x.to(other)))
    x.requires_grad_()
    y = torch.nn.functional.gelu(x)
    (slope,) = torch.autograd.grad(gelu(x)[0].sum(), x)
    torch.testing.assert_close(slope, torch.autograd.grad(y.sum(), x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    text = """g (float[2,5] x, float[5,5] w, float m) => (float[2,5] z) {
        h = MatMul(x, w)  c = Cast<to=1>(h)  masked = Add(c, m)  p = Softmax(masked)  z = Mul(p, h) }"""
    model = parse(text, {"w": floats(5, 5), "m": np.float32(-3.4e38)})
    feeds = {"x": floats(2, 5)}
    (got,) = (v.to(torch.float64) for v in to_torch(model, dtype=dtype)(torch.from_numpy(feeds["x"])))
    limit = {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    np.testing.assert_allclose(got.numpy(), run(model, feeds)[0], atol=limit)
    kept = to_torch(model, dtype=dtype, cast_outputs=True)(torch.from_numpy(feeds["x"]))[0]
    assert kept.dtype is torch.float32


def test_a_readable_module() -> None:
    model = parse(
        "g (float[2,4] x, float[4,3] w, float[3] b, float s) => (float[2,3] z) {"
        " h = MatMul(x, w) g = Add(h, b) n = Mul(g, s) z = Relu(n) }",
        {"w": floats(4, 3), "b": floats(3), "s": np.float32(0.5)},
    )
    code = to_torch(model).code
    assert ("h = x @ w" in code and "g_1 = h + b" in code) or "g = h + b" in code
    assert "* 0.5" in code and "torch.relu(" in code


CONTROL = {
    "if": (
        """g (bool c, float[2] x, float[2] y) => (float[2] z) {
        s = Add(x, y)
        z = If (c) <then_branch = t () => (float[2] u) { u = Mul(s, x) }, else_branch = e () => (float[2] v) { v =
        Sub(s, y) }> }""",
        {"c": np.array(True), "x": floats(2), "y": floats(2)},
    ),
    "loop": (
        """g (float[2] x, float[2] w) => (float[2] z, float[k,2] all) {
        n = Constant<value_int=4>()  go = Constant<value=bool {1}>()
        z, all = Loop (n, go, x) <body = b (int64 i, bool ok, float[2] state) => (bool keep, float[2] next, float[2]
        seen) {
            keep = Identity(ok)  f = Cast<to=1>(i)  m = Mul(state, w)  next = Add(m, f)  seen = Neg(next) }> }""",
        {"x": floats(2), "w": floats(2)},
    ),
    "scan": (
        """g (float[2] x, float[5,2] xs) => (float[2] z, float[5,2] ys) {
        z, ys = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) {
            t = Add(s, e)  o = Mul(t, e) }> (x, xs) }""",
        {"x": floats(2), "xs": floats(5, 2)},
    ),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow(name: str) -> None:
    text, feeds = CONTROL[name]
    check(text, feeds)
    if name == "if":
        check(text, {**feeds, "c": np.array(False)})


def test_a_loop_of_no_rounds() -> None:
    text = """g (float[2] x) => (float[2] z, float[k,2] all) {
        n = Constant<value_int=0>()  go = Constant<value=bool {1}>()
        z, all = Loop (n, go, x) <body = b (int64 i, bool ok, float[2] s) => (bool keep, float[2] next, float[2] seen) {
            keep = Identity(ok)  next = Identity(s)  seen = Neg(s) }> }"""
    check(text, {"x": floats(2)})


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers(kind: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[kind]
    text = f"""g (float[5,2,3] x, float[2,{4 * gates},3] w, float[2,{4 * gates},4] r, float[2,{8 * gates}] b,
    int32[2] n)
        => (float[5,2,2,4] y, float[2,2,4] h) {{ y, h = {kind}<hidden_size=4, direction="bidirectional">(x, w, r, b,
        n) }}"""
    constants = {"w": floats(2, 4 * gates, 3), "r": floats(2, 4 * gates, 4), "b": floats(2, 8 * gates)}
    check(text, {"x": floats(5, 2, 3), "n": np.array([5, 3], np.int32)}, constants)


def test_torch_operators_are_called_as_they_were() -> None:
    x, a = torch.rand(3, 4) + 0.5, torch.rand(4) + 0.5

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return torch.special.gammainc(x, a).relu() + x

    from xform.capture.torch_module import capture_torch

    captured = capture_torch(Module(), (x, a))
    assert any(node.domain == "torch" for node in captured.model.graph)
    module = to_torch(captured.model)
    torch.testing.assert_close(module(x, a)[0], Module()(x, a))


def test_torch_operators_are_on_the_device_of_the_run() -> None:
    """A module is captured on one device and runs on another."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.kaiser_window(4)

    from xform.capture.torch_module import capture_torch

    x = torch.rand(4)
    module = to_torch(capture_torch(Module(), (x,)).model)
    torch.testing.assert_close(module(x)[0], Module()(x))
    assert "kaiser_window" in module.code and "device(type" not in module.code


def test_mel_weights_are_on_the_device_of_the_run() -> None:
    text = """g (float[9,2] x, int64 n) => (float[9,2] y) {
        d = Constant<value_int = 16>() r = Constant<value_int = 8192>() l = Constant<value_float = 0.0>()
        h = Constant<value_float = 4096.0>() w = MelWeightMatrix(n, d, r, l, h) y = Mul(x, w) }"""
    module = to_torch(parse(text))
    (node,) = (node for node in module.graph.nodes if "mel_weights" in str(node.target))
    assert node.args[-1].op == "placeholder"
    weights = node.target(2, 16, 8192, 0.0, 4096.0, torch.float32, torch.empty(1, device="meta"))
    assert weights.device.type == "meta" and weights.shape == (9, 2)


def test_unsigned_division_beyond_the_sign_bit() -> None:
    text = "g (uint64[4] x, uint64[4] y) => (uint64[4] q, uint64[4] r) { q = Div(x, y) r = Mod(x, y) }"
    x = np.array([2**64 - 1, 2**63, 2**64 - 1, 5], np.uint64)
    y = np.array([3, 7, 2**63 + 1, 2**64 - 2], np.uint64)
    module = to_torch(parse(text))
    quotient, rest = module(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_array_equal(quotient.numpy(), x // y)
    np.testing.assert_array_equal(rest.numpy(), x % y)


def test_axes_that_only_the_run_tells() -> None:
    check(
        "g (float[2,3,4] x, int64[k] a) => (float z) { s = ReduceMax<keepdims=1>(x, a) z = ReduceSum<keepdims=0>(s) }",
        {"x": floats(2, 3, 4), "a": np.array([-1, 0])},
    )


def test_an_initializer_that_is_an_input_may_be_left_out() -> None:
    model = parse("g (float[2] w, float[2] x) => (float[2] z) { z = Add(w, x) }")
    value = model.graph.inputs[0]
    value.const_value = ir.tensor(np.array([1, 2], np.float32), name="w")
    model.graph.register_initializer(value)
    module, x = to_torch(model), torch.zeros(2)
    assert module(None, x)[0].tolist() == [1, 2]
    assert module(torch.tensor([5.0, 6.0]), x)[0].tolist() == [5, 6]


def test_positions_and_masks_keep_their_digits_in_half_precision() -> None:
    """Position 1001 has no bfloat16, and the most negative float32 no float16."""
    text = """g (int64[s] p, bool[s] keep, float[s,2] x, float[1,2] f, float low, float none) => (float[s,2] z,
    float[s,s] w) {
        t = Cast<to=1>(p)  one = Constant<value_ints=[1]>()  col = Unsqueeze(t, one)  angle = Mul(col, f)
        c = Cos(angle)  z = Mul(c, x)
        bias = Where(keep, none, low)  xt = Transpose<perm=[1,0]>(x)  m = MatMul(x, xt)  s = Add(m, bias)  w =
        Softmax(s) }"""
    model = parse(text, {"f": np.array([[1.0, 0.37]], np.float32), "low": np.float32(-3.4e38), "none": np.float32(0)})
    feeds = {"p": np.array([3, 1001, 4095]), "keep": np.array([True, False, True]), "x": floats(3, 2)}
    want = run(model, feeds)
    for dtype in (torch.bfloat16, torch.float16):
        for got, expected in zip(outputs(model, feeds, dtype=dtype, cast_outputs=True), want, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-2)


def test_comparisons_of_positions_are_exact_in_half_precision() -> None:
    text = """g (int64[s] p, float[s] x) => (float[s] z) {
        t = Cast<to=1>(p)  limit = Constant<value_float=1001.0>()  late = Less(limit, t)
        l = Cast<to=1>(late)  z = Mul(l, x) }"""
    model = parse(text)
    feeds = {"p": np.array([1000, 1001, 1002, 1003]), "x": np.ones(4, np.float32)}
    assert outputs(model, feeds, dtype=torch.bfloat16, cast_outputs=True)[0].tolist() == [0, 0, 1, 1]


def test_a_token_for_every_image_leaves_the_batch_dynamic() -> None:
    text = """g (float[b,3,4] x, float[1,1,4] token) => (float[b,4,4] z) {
        shape = Shape(x)  zero = Constant<value_ints=[0]>()  b = Gather(shape, zero)  rest =
        Constant<value_ints=[-1,-1]>()
        ones = Constant<value_ints=[1,4]>()  target = Concat<axis=0>(b, ones)  t = Expand(token, target)
        z = Concat<axis=1>(t, x) }"""
    module = to_torch(parse(text, {"token": floats(1, 1, 4)}))
    exported = torch.export.export(module, (torch.randn(2, 3, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert exported.module()(torch.randn(5, 3, 4))[0].shape == (5, 4, 4)


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_a_constant_of_more_axes_raises_the_rank(operator: str) -> None:
    constant = np.full((1, 1, 1), 2, np.float32)
    text = f"g (float[N,5] x, float[1,1,1] c) => (float[1,N,5] y) {{ y = {operator}(x, c) }}"
    check(text, {"x": np.abs(floats(3, 5)) + 1}, {"c": constant})


@pytest.mark.parametrize("height", [0, 6])
def test_an_inferred_dim_of_an_empty_tensor(height: int) -> None:
    text = """g (float[N,3,H,4] x, int64[1] m, int64[1] f) => (float[A,B,4] y) {
        s = Shape<start=2, end=3>(x)  t = Concat<axis=0>(m, s, f)  y = Reshape(x, t) }"""
    check(text, {"x": floats(2, 3, height, 4)}, {"m": np.array([-1], np.int64), "f": np.array([4], np.int64)})


@pytest.mark.parametrize("batch", [0, 3])
def test_ranges_of_an_empty_batch(batch: int) -> None:
    text = """g (float[N,4] x) => (uint8[N,4] y, float[] s, uint8[] z) { y, s, z = DynamicQuantizeLinear(x) }"""
    check(text, {"x": floats(batch, 4)})


def test_the_extremes_of_an_empty_batch_are_bounds_of_the_type() -> None:
    model = parse("g (float[N,4] x) => (float[1,1] y) { y = ReduceMax(x) }")
    (got,) = outputs(model, {"x": np.zeros((0, 4), np.float32)})
    assert got.shape == (1, 1) and np.isneginf(got).all()


EMPTY = {
    "InstanceNormalization": (
        "(float[N,4,6] x) => (float y) <float[4] a = {1,2,3,4}>",
        "InstanceNormalization(x, a, a)",
    ),
    "CumSum": ("(float[N,4,6] x) => (float y) <int64 i = {0}>", "CumSum<exclusive=1>(x, i)"),
    "CumSum reversed": ("(float[N,4,6] x) => (float y) <int64 i = {0}>", "CumSum<exclusive=1, reverse=1>(x, i)"),
    "DFT": ("(float[N,4,1] x) => (float y) <int64 a = {1}>", "DFT(x, , a)"),
    "inverse DFT": ("(float[N,4,2] x) => (float y) <int64 a = {1}>", "DFT<inverse=1>(x, , a)"),
    "STFT": ("(float[N,16,1] x) => (float y) <int64 s = {2}, int64 l = {4}>", "STFT(x, s, , l)"),
    "Col2Im": ("(float[N,8,9] x) => (float y) <int64[2] i = {4,4}, int64[2] b = {2,2}>", "Col2Im(x, i, b)"),
    "AffineGrid": ("(float[N,2,3] x) => (float y) <int64[4] s = {0,1,3,5}>", "AffineGrid(x, s)"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch(name: str) -> None:
    interface, call = EMPTY[name]
    model = parse(f"g {interface} {{ y = {call} }}")
    shape = [dim if isinstance(dim, int) else 0 for dim in model.graph.inputs[0].shape or ()]
    feeds = {"x": np.zeros(shape, np.float32)}
    (got,), (want,) = outputs(model, feeds), run(model, feeds)
    assert got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.parametrize("operator", ["LpPool", "MaxPool", "AveragePool"])
def test_pooling_without_a_window(operator: str) -> None:
    model = parse(f"g (float[2,3,4,2] x) => (float y) {{ y = {operator}<kernel_shape = [3,3]>(x) }}")
    feeds = {"x": floats(2, 3, 4, 2)}
    (got,), (want,) = outputs(model, feeds), run(model, feeds)
    assert got.shape == want.shape == (2, 3, 2, 0)


def test_hardmax_and_dynamic_quantization_beside_nan() -> None:
    nan, inf = np.nan, np.inf
    x = np.array([[nan, nan, nan], [1, nan, 2], [3, 1, nan], [inf, 1, inf], [-inf, -inf, -inf]], np.float32)
    check("g (float[5,3] x) => (float[5,3] y) { y = Hardmax(x) }", {"x": x})
    check(
        "g (float[2,3] x) => (uint8[2,3] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
        {"x": np.array([[1, nan, -2], [3, 1, nan]], np.float32)},
    )
