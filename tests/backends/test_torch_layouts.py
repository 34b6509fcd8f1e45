"""Weights of convolutions channels last where that is faster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import floats, parse

from xform.backends.torch_triton.layouts import Layouts
from xform.backends.torch_triton.lower import to_torch

TEXT = """g (float[2,3,8,8] x, float[4,3,3,3] w, float[4] b, float[5,4,1,1] v) => (float[2,5,8,8] z) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b) r = Relu(c) z = Conv(r, v) }"""


def make() -> torch.fx.GraphModule:
    return to_torch(parse(TEXT, {"w": floats(4, 3, 3, 3), "b": floats(4), "v": floats(5, 4, 1, 1)}))


def clock(*readings: float) -> Iterator[float]:
    return iter(readings)


@pytest.mark.parametrize(("last", "chosen"), [(0.5, "channels_last"), (0.99, "contiguous"), (2.0, "contiguous")])
def test_the_faster_layout_is_kept(last: float, chosen: str) -> None:
    module, x = make(), torch.from_numpy(floats(2, 3, 8, 8))
    want = module(x)[0]
    state = {name: (tensor.clone(), tensor.stride()) for name, tensor in module.state_dict().items()}
    layouts, times = Layouts(module), clock(1.0, last)
    measured = layouts.choose(lambda: next(times))
    assert measured == {"chosen": chosen, "seconds": {"contiguous": 1.0, "channels_last": last}}
    got = module(x)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    is_last = chosen == "channels_last"
    assert got.is_contiguous(memory_format=torch.channels_last) is is_last
    for name, tensor in module.state_dict().items():
        before, strides = state[name]
        assert torch.equal(tensor, before)
        assert (tensor.stride() != strides) is (is_last and tensor.ndim == 4)
    choice = layouts.as_choice(measured)
    assert choice.applied is is_last and len(choice.nodes) == 2 and ("gains nothing" in choice.reason) is not is_last


def test_both_are_timed_as_they_would_run() -> None:
    module, x = make(), torch.from_numpy(floats(2, 3, 8, 8))
    seen = []

    def seconds() -> float:
        seen.append(module(x)[0].is_contiguous(memory_format=torch.channels_last))
        return 1.0

    Layouts(module).choose(seconds)
    assert seen == [False, True]


def test_there_is_nothing_to_choose_without_convolutions_over_two_axes() -> None:
    text = "g (float[2,3,8] x, float[4,3,3] w) => (float[2,4,6] z) { z = Conv(x, w) }"
    layouts = Layouts(to_torch(parse(text, {"w": floats(4, 3, 3)})))
    assert layouts.choose(lambda: pytest.fail("timed for nothing")) is None and layouts.nodes == ()
