"""What only a GPU can show: run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from support import floats, parse

import xform
from xform.backends.torch_triton.cuda_graphs import Replayer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")]

TEXT = """g (float[4,64] x, float[64,64] w, float[64] s) => (float[4,64] z, float[4,64] same) {
    m = MatMul(x, w) r = Add(m, x) n = RMSNormalization(r, s) z = Gelu(n) same = Relu(x) }"""


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize("compile_mode", ["off", "inductor"])
def test_optimized_for_cuda(precision: str | None, compile_mode: str) -> None:
    model = parse(TEXT, {"w": floats(64, 64) / 8, "s": floats(64)})
    fast = xform.optimize(model, target="cuda", precision=precision, compile=compile_mode)
    here = xform.optimize(model, target="cpu")
    x = torch.from_numpy(floats(4, 64))
    limit = 1e-4 if precision is None else 5e-2
    for _ in range(3):
        for device in ("cpu", "cuda"):
            got = fast(x.to(device))
            assert got["z"].device.type == device
            torch.testing.assert_close(got["z"].cpu(), here(x)["z"], rtol=limit, atol=limit)


def test_outputs_of_replayed_graphs_belong_to_the_caller() -> None:
    model = parse(TEXT, {"w": floats(64, 64) / 8, "s": floats(64)})
    fast = xform.optimize(model, target="cuda")
    x, y = (torch.from_numpy(floats(4, 64)).cuda() for _ in range(2))
    first = {name: value.clone() for name, value in fast(x).items()}
    kept = fast(x)
    fast(y)
    for name, value in first.items():
        assert torch.equal(kept[name], value)


def test_what_waits_for_the_device_is_refused_and_spoils_nothing() -> None:
    waits = Replayer(lambda x: (x * x.sum().item(),))
    x = torch.ones(4, device="cuda")
    here = torch.cuda.current_stream()
    assert torch.equal(waits(x)[0], 4 * x) and waits.refused is not None and "synchron" in waits.refused
    assert torch.cuda.current_stream() == here and torch.cuda.get_sync_debug_mode() == 0
    records = Replayer(lambda x: (x * 2,))
    assert torch.equal(records(x)[0], 2 * x) and records.refused is None


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resizing_is_recorded(mode: str) -> None:
    resize = f'Resize <mode = "{mode}"> (x, , , sizes)'
    model = parse(
        "g (float[1,3,8,8] x) => (float[1,3,16,16] y) <int64[4] sizes = {1, 3, 16, 16}> { y = " + resize + " }"
    )
    x = torch.from_numpy(floats(1, 3, 8, 8))
    fast = xform.optimize(model, target="cuda")
    torch.testing.assert_close(fast(x.cuda())["y"].cpu(), xform.optimize(model, target="cpu")(x)["y"])
    assert fast.artifact.metadata["cuda_graph"] == "recorded"


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_channels_lie_where_it_is_faster(precision: str) -> None:
    shapes = {"w": (64, 3, 3, 3), "v": (64, 64, 3, 3)}
    text = """g (float[8,3,64,64] x, float[64,3,3,3] w, float[64,64,3,3] v) => (float[8,64,60,60] z) {
        c = Conv(x, w) r = Relu(c) z = Conv(r, v) }"""
    model = parse(text, {name: floats(*shape) / 8 for name, shape in shapes.items()})
    fast, here = xform.optimize(model, target="cuda", precision=precision), xform.optimize(model, target="cpu")
    x = torch.from_numpy(floats(8, 3, 64, 64))
    got = fast(x.cuda())["z"]
    torch.testing.assert_close(got.cpu(), here(x)["z"], rtol=5e-2, atol=5e-2)
    is_last = fast.artifact.metadata["layout"]["chosen"] == "channels_last"
    assert got.is_contiguous(memory_format=torch.channels_last) is is_last


def test_products_are_packed_where_it_is_faster() -> None:
    weights = {name: floats(256, 256) / 16 for name in ("q", "k", "v")}
    text = """g (float[8,256] x, float[256,256] q, float[256,256] k, float[256,256] v) => (float[8,256] z) {
        a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v) s = Mul(a, b) z = Add(s, c) }"""
    model = parse(text, weights)
    fast, here = xform.optimize(model, target="cuda"), xform.optimize(model, target="cpu")
    x = torch.from_numpy(floats(8, 256))
    for _ in range(2):
        torch.testing.assert_close(fast(x.cuda())["z"].cpu(), here(x)["z"], rtol=1e-4, atol=1e-4)
    (line,) = fast.artifact.metadata["products"]
    assert line["widths"] == [256] * 3 and ("split(" in fast.artifact.module.code) is line["packed"]


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_integer_products_stay_on_the_device(dtype: str) -> None:
    model = parse(f"g ({dtype}[2,4] x, {dtype}[4,3] w) => ({dtype}[2,3] z) {{ y = MatMul(x, w) z = Add(y, y) }}")
    x, w = (torch.randint(-9, 9, shape, dtype=getattr(torch, dtype)) for shape in ((2, 4), (4, 3)))
    got = xform.optimize(model, target="cuda")(x.cuda(), w.cuda())["z"]
    assert got.is_cuda and torch.equal(got.cpu(), 2 * (x.long() @ w.long()).to(x.dtype))


def test_a_package_for_the_gpu(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = parse(TEXT, {"w": floats(64, 64) / 8, "s": floats(64)})
    fast = xform.optimize(model, target="cuda")
    x = torch.from_numpy(floats(4, 64)).cuda()
    want = fast(x)["z"]
    (path,) = fast.save(tmp_path / "m.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(x)[0], want, rtol=1e-4, atol=1e-4)
