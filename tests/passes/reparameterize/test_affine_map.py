"""The algebra of affine maps in float64, against torch's convolutions: sums and compositions, borders included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xform.passes.reparameterize.affine_map import AffineMap, Window, add, compose, identity, scaling
from xform.passes.reparameterize.affine_region import Region, Term

TOLERANCE = 1e-10
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


def window(kernel, strides, dilations, begins, ends, *, transposed=False, extra=0):
    reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    if transposed:
        slack = [r + extra - b - e for r, b, e in zip(reach, begins, ends, strict=True)]
    else:
        slack = [b + e - r for r, b, e in zip(reach, begins, ends, strict=True)]
    return Window(tuple(kernel), tuple(strides), tuple(dilations), tuple(begins), tuple(slack))


def conv(rng, inputs, outputs, group, place, *, bias=True, transposed=False):
    kernel = rng.normal(size=(outputs, inputs // group, *place.kernel))
    shift = rng.normal(size=outputs) if bias else np.zeros(outputs)
    return AffineMap(inputs, outputs, group, place, not bias, lambda: (kernel, shift), transposed)


def run(part: AffineMap, x: np.ndarray) -> np.ndarray:
    """The map on x [N, C, *spatial] by torch, padding written out."""
    kernel, bias = (torch.from_numpy(np.ascontiguousarray(a)) for a in part.arrays)
    rank = x.ndim - 2
    place = part.window if part.window.rank else Window.pointwise(rank)
    kernel = kernel.reshape(*kernel.shape[:2], *place.kernel)
    data = torch.from_numpy(x)
    if part.transposed:
        op = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
        blocks = kernel.reshape(part.group, part.outputs // part.group, part.inputs // part.group, *place.kernel)
        weight = blocks.transpose(1, 2).reshape(part.inputs, part.outputs // part.group, *place.kernel)
        full = op(data, weight, None, place.strides, 0, 0, part.group, place.dilations)
        for axis in range(rank):
            ends = place.ends(transposed=True)[axis]
            if ends < 0:
                full = torch.nn.functional.pad(full, [0, 0] * (rank - 1 - axis) + [0, -ends])
            full = full.narrow(axis + 2, place.begins[axis], full.shape[axis + 2] - place.begins[axis] - max(ends, 0))
        return (full + bias.reshape(-1, *[1] * rank)).numpy()
    op = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    pads = [p for b, e in zip(place.begins[::-1], place.ends()[::-1], strict=True) for p in (b, max(e, 0))]
    padded = torch.nn.functional.pad(data, pads)
    return op(padded, kernel, bias, place.strides, 0, place.dilations, part.group).numpy()


sizes = st.integers(1, 4)


@st.composite
def geometry(draw, rank, *, stride=None, pads=None):
    kernel = [draw(sizes) for _ in range(rank)]
    dilations = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) if stride is None else stride for _ in range(rank)]
    begins = [draw(st.integers(0, 3)) if pads is None else pads for _ in range(rank)]
    ends = [draw(st.integers(0, 3)) if pads is None else pads for _ in range(rank)]
    return window(kernel, strides, dilations, begins, ends)


def groups_of(draw, inputs, outputs):
    return draw(st.sampled_from([g for g in (1, 2, 3, 6) if inputs % g == 0 and outputs % g == 0]))


@SETTINGS
@given(st.data())
def test_a_sum_of_aligned_convolutions_is_one(data):
    draw = data.draw
    rank, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    inputs, outputs = draw(st.sampled_from([(6, 6), (6, 12), (12, 6)]))
    parts = []
    for _ in range(2):
        kernel = [2 * draw(st.integers(0, 2)) + 1 for _ in range(rank)]
        dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
        pads = [d * (k // 2) for k, d in zip(kernel, dilations, strict=True)]
        place = window(kernel, [stride] * rank, dilations, pads, pads)
        parts.append(conv(rng, inputs, outputs, groups_of(draw, inputs, outputs), place, bias=draw(st.booleans())))
    merged = add(*parts)
    assert isinstance(merged, AffineMap), merged
    x = rng.normal(size=(2, inputs, *[draw(st.integers(5, 9)) for _ in range(rank)]))
    np.testing.assert_allclose(run(merged, x), run(parts[0], x) + run(parts[1], x), atol=TOLERANCE)


@SETTINGS
@given(st.data())
def test_an_identity_and_a_scaling_join_a_convolution(data):
    draw = data.draw
    rank = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kernel = [2 * draw(st.integers(0, 2)) + 1 for _ in range(rank)]
    pads = [k // 2 for k in kernel]
    place = window(kernel, [1] * rank, [1] * rank, pads, pads)
    part = conv(rng, 6, 6, draw(st.sampled_from([1, 2, 3, 6])), place)
    scale = scaling(rng.normal(size=6), rng.normal(size=6), 6)
    merged = add(add(identity(6), part), scale)
    assert merged.window == place
    assert merged.group == part.group
    x = rng.normal(size=(1, 6, *[7] * rank))
    np.testing.assert_allclose(run(merged, x), x + run(part, x) + run(scale, x), atol=TOLERANCE)


@SETTINGS
@given(st.data())
def test_a_composition_is_one_map_or_refused_for_the_border(data):
    draw = data.draw
    rank = draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    inner = conv(rng, 6, 6, draw(st.sampled_from([1, 2, 3, 6])), draw(geometry(rank)), bias=draw(st.booleans()))
    outer = conv(rng, 6, 6, draw(st.sampled_from([1, 2, 3, 6])), draw(geometry(rank)), bias=draw(st.booleans()))
    x = rng.normal(size=(1, 6, *[draw(st.integers(24, 29)) for _ in range(rank)]))
    merged = compose(outer, inner)
    if isinstance(merged, str):
        assert outer.window.pads
        assert not inner.unbiased or inner.window.taps > 1
        return
    middle = run(inner, x)
    assume(
        all(
            m >= d * (k - 1) + 1
            for m, k, d in zip(middle.shape[2:], outer.window.kernel, outer.window.dilations, strict=True)
        )
    )
    np.testing.assert_allclose(run(merged, x), run(outer, middle), atol=TOLERANCE)


def test_the_refusals_of_the_border_rule_are_needed():
    """Merged all the same, the border is wrong and the inside is right."""
    rng = np.random.default_rng(3)
    inner = conv(rng, 4, 4, 1, Window.pointwise(2))
    outer = conv(rng, 4, 4, 1, window([3, 3], [1, 1], [1, 1], [1, 1], [1, 1]))
    assert "pads its operand with zeros" in compose(outer, inner)
    wrong = compose(outer, inner, lenient=True)
    x = rng.normal(size=(1, 4, 9, 9))
    difference = np.abs(run(wrong, x) - run(outer, run(inner, x))).max(axis=(0, 1))
    assert difference[1:-1, 1:-1].max() < TOLERANCE
    assert difference[0].max() > 0.1
    without = AffineMap(4, 4, 1, inner.window, True, lambda: (inner.arrays[0], np.zeros(4)))
    exact = compose(outer, without)
    np.testing.assert_allclose(run(exact, x), run(outer, run(without, x)), atol=TOLERANCE)


@SETTINGS
@given(st.data())
def test_pointwise_maps_compose_with_transposed_convolutions(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kernel, stride = [draw(sizes), draw(sizes)], draw(st.integers(1, 3))
    pads = [draw(st.integers(0, (k - 1) // 2)) for k in kernel]
    place = window(kernel, [stride] * 2, [1, 1], pads, pads, transposed=True, extra=draw(st.integers(0, stride - 1)))
    part = conv(rng, 6, 12, draw(st.sampled_from([1, 2, 3, 6])), place, transposed=True)
    before = conv(rng, 4, 6, draw(st.sampled_from([1, 2])), Window.pointwise(2), bias=False)
    after = conv(rng, 12, 8, draw(st.sampled_from([1, 2, 4])), Window())
    merged = compose(after, compose(part, before))
    assert isinstance(merged, AffineMap), merged
    x = rng.normal(size=(2, 4, 5, 6))
    np.testing.assert_allclose(run(merged, x), run(after, run(part, run(before, x))), atol=TOLERANCE)
    shifted = conv(rng, 4, 6, 1, Window.pointwise(2), bias=True)
    assert "spreads a shift unevenly" in compose(part, shifted)


def test_transposed_convolutions_of_aligned_windows_add_up():
    rng = np.random.default_rng(5)
    wide = conv(rng, 4, 6, 1, window([4, 4], [2, 2], [1, 1], [1, 1], [1, 1], transposed=True), transposed=True)
    small = conv(rng, 4, 6, 2, window([2, 2], [2, 2], [1, 1], [0, 0], [0, 0], transposed=True), transposed=True)
    merged = add(wide, small)
    assert merged.window == wide.window
    x = rng.normal(size=(1, 4, 5, 7))
    np.testing.assert_allclose(run(merged, x), run(wide, x) + run(small, x), atol=TOLERANCE)
    plain = conv(rng, 4, 6, 1, window([3, 3], [2, 2], [1, 1], [1, 1], [1, 1]))
    assert "transposed" in add(wide, plain)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ((3, 1, 1), (3, 2, 1), "strides differ"),
        ((3, 1, 1), (1, 1, 0), None),
        ((5, 2, 2), (1, 2, 0), None),
    ],
)
def test_strides_must_agree(a, b, reason):
    rng = np.random.default_rng(0)
    parts = [conv(rng, 4, 4, 1, window([k, k], [s, s], [1, 1], [p, p], [p, p])) for k, s, p in (a, b)]
    merged = add(*parts)
    if reason is not None:
        assert reason in merged
        return
    x = rng.normal(size=(1, 4, 8, 11))
    np.testing.assert_allclose(run(merged, x), run(parts[0], x) + run(parts[1], x), atol=TOLERANCE)


def test_dilated_branches_share_one_lattice():
    """As in UniRepLKNet: a sparse kernel joins a dense one; a 3x3 at dilation 2 needs a 5x5."""
    rng = np.random.default_rng(8)
    dense = conv(rng, 6, 6, 6, window([5, 5], [1, 1], [1, 1], [2, 2], [2, 2]))
    sparse = conv(rng, 6, 6, 6, window([3, 3], [1, 1], [2, 2], [2, 2], [2, 2]))
    merged = add(dense, sparse)
    assert merged.window == dense.window
    centre = conv(rng, 6, 6, 6, Window.pointwise(2))
    kept = add(sparse, centre)
    assert kept.window == sparse.window, "the centre lies on the dilated lattice"
    x = rng.normal(size=(1, 6, 9, 8))
    for result, parts in ((merged, (dense, sparse)), (kept, (sparse, centre))):
        np.testing.assert_allclose(run(result, x), run(parts[0], x) + run(parts[1], x), atol=TOLERANCE)


def test_groups_merge_to_their_greatest_common_divisor():
    rng = np.random.default_rng(9)
    place = window([3], [1], [1], [1], [1])
    for g, h, expected in ((2, 3, 1), (6, 2, 2), (12, 6, 6), (4, 6, 2)):
        a, b = conv(rng, 12, 24, g, place), conv(rng, 12, 24, h, place)
        merged = add(a, b)
        assert merged.group == expected
        x = rng.normal(size=(1, 12, 7))
        np.testing.assert_allclose(run(merged, x), run(a, x) + run(b, x), atol=TOLERANCE)
        after = conv(rng, 24, 12, h, Window())
        both = compose(after, a)
        assert both.group == expected
        np.testing.assert_allclose(run(both, x), run(after, run(a, x)), atol=TOLERANCE)


def test_constant_terms_alone_leave_one_term_with_every_shift_once():
    generator = np.random.default_rng(5)
    shifts = generator.normal(size=(3, 4))
    sources = [ir.Value(name=f"x{i}", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT)) for i in (0, 0, 1)]
    constants = [replace(scaling(np.zeros(1), shift, 4), zero=True) for shift in shifts]
    terms = [Term(source, 1, part) for source, part in zip(sources, constants, strict=True)]
    region = Region(((sources[0], 1),), [terms])
    region.settle()
    ((left,),) = region.terms
    np.testing.assert_allclose(left.map.arrays[1], shifts.sum(axis=0), rtol=1e-15)
