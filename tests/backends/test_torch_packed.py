"""Attention of packed rows: between sequences where the mask says padding, padded where it says more."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from packed_support import BLOCK, PADDING, TOGETHER, B, C, H, S
from support import parse

from xform.backends.torch_triton.fuse import counts, fuse
from xform.backends.torch_triton.kernels.packed_attention import kernel, padding
from xform.backends.torch_triton.lower import to_torch
from xform.passes.attention import PackTokens
from xform.rewrite.passes import PassContext
from xform.target import Target

RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((C, C)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
CONSTANTS = {
    **WEIGHTS, "wqkv": np.concatenate([WEIGHTS[name] for name in ("wq", "wk", "wv")], 1), "axes": np.array([1, 2]),
    "heads": np.array([B, S, H, C // H]), "merged": np.array([B, S, C]), "last": np.array([2]),
    "zero": np.array(0.0, np.float32), "lowest": np.array(-1e30, np.float32),
    "future": np.tril(np.ones((S, S), bool))[None, None],
    "window": (np.abs(np.arange(S)[:, None] - np.arange(S)) < 2)[None, None],
    "slope": -0.1 * np.abs(np.arange(S)[:, None] - np.arange(S)).astype(np.float32)[None, None],
}  # fmt: skip
MASKS = {
    "boolean": "bias = Identity(keys)",
    "additive": "bias = Where(keys, zero, lowest)",
    "causal": "bias = And(keys, future)",
    "window": "bias = And(keys, window)",
    "slope": "open = Where(keys, zero, lowest) bias = Add(open, slope)",
}
SEPARATE = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"


def model_of(mask: str, projections: str = SEPARATE, *, dynamic: bool = False) -> Any:
    body = BLOCK.replace("@mask", MASKS[mask]).replace("@projections", projections)
    used = {name: array for name, array in CONSTANTS.items() if f"{name})" in body or f"{name}," in body}
    kinds = {"float32": "float", "int64": "int64", "bool": "bool"}
    declared = "".join(f", {kinds[a.dtype.name]}{list(a.shape) if a.ndim else ''} {n}" for n, a in used.items())
    return parse(
        f"g (float[{B},{S},{C}] x, int64[{B},{S}] mask{declared}) => (float[{B},{S},{C}] y) {{ {body} }}", used
    )


def packed(model: Any) -> torch.fx.GraphModule:
    assert PackTokens().run(model, PassContext(Target("cpu")))
    return to_torch(model)


def feeds(pads: str) -> dict[str, np.ndarray]:
    return {"x": RNG.standard_normal((B, S, C)).astype(np.float32), "mask": np.array(PADDING[pads])}


def same(module: torch.fx.GraphModule, model: Any, inputs: dict[str, np.ndarray]) -> None:
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    torch.testing.assert_close(module(*tensors), to_torch(model)(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pads", PADDING)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_attention_with_padding(mask: str, pads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    real = kernel.packed_attention
    monkeypatch.setattr(kernel, "packed_attention", lambda *a: calls.append(a) or real(*a))  # type: ignore[func-returns-value]
    module = packed(model_of(mask))
    assert counts(fuse(module)) == {"packed_attention": 1}
    assert "scaled_dot_product" not in module.code
    assert module.code.split("attend")[0].count("gather(") == 1  # of the places themselves, no row is unpacked
    same(module, model_of(mask), feeds(pads))
    tokens_alone = mask in ("boolean", "additive", "causal")
    # without padding (or with one token a sequence) a window is still a window
    assert bool(calls) == (tokens_alone or (pads == "empty" and mask == "window"))
    if calls:
        rows = calls[0][0].shape[0]
        assert rows == sum(map(sum, PADDING[pads])) + (not PADDING[pads][0][0])
        if mask == "causal" and pads != "empty":
            assert calls[0][-1] is True


def test_flash_attention_is_never_told_of_single_queries() -> None:
    """It would lay shared key heads out by the number of sequences, of which the first may be empty."""
    valid = torch.tensor([True, False, True, False])
    places = torch.tensor([[0, 0], [1, 0]])
    mask = valid.reshape(2, 1, 1, 2)
    found = padding.plan(valid, places, mask)
    assert found is not None and found.longest == 2 and found.starts.tolist() == [0, 0, 1, 2]


def test_sizes_that_are_known_only_when_it_runs() -> None:
    module = packed(model_of("boolean", dynamic=True))
    assert counts(fuse(module)) == {"packed_attention": 1}
    for pads in ("right", "left"):
        same(module, model_of("boolean"), feeds(pads))


def test_projections_that_were_multiplied_together() -> None:
    module = packed(model_of("boolean", TOGETHER))
    assert counts(fuse(module)) == {"packed_attention": 1}
    same(module, model_of("boolean", TOGETHER), feeds("left"))


def test_halves_on_a_gpu_go_through_one_kernel_and_others_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "_has_kernel", lambda *_: False)
    module = packed(model_of("additive"))
    fuse(module)
    same(module, model_of("additive"), feeds("holes"))


def test_what_is_read_padded_stays_padded() -> None:
    """The layout of `pack_tokens` with the result of attention read once more."""
    module = packed(model_of("boolean"))
    attention = next(n for n in module.graph.nodes if "scaled_dot" in str(n.target))
    with module.graph.inserting_before(module.graph.output_node()):
        total = module.graph.call_function(torch.sum, (attention,))
    module.graph.output_node().args = ((*module.graph.output_node().args[0], total),)
    module.recompile()
    (finding,) = fuse(module)
    assert "read by more" in finding.missed and finding.concept == "attention"
