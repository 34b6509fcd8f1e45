"""Inputs chosen to break rewrites: masks in every style, sizes, values, and what the user gave."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xform.capture.onnx_file import capture_onnx
from xform.pipeline.branches import Watch, branches, forced
from xform.pipeline.input_roles import compared_with, role_of
from xform.pipeline.masks import STYLES, mask
from xform.pipeline.oracle import run_model
from xform.pipeline.reference import OriginalModel, Reference, run_anywhere
from xform.pipeline.verify import Verifier, verify


def parse(text: str, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return capture_onnx(proto)


def masked(batch: str, declared: str, made: str) -> ir.Model:
    text = f"g (float[{batch},2,6,8] q, float[{batch},2,8,6] k, {declared} m) => (float[{batch},2,6,6] y)"
    body = f"{{ l = MatMul(q, k) {made} w = Where(c, l, fill) y = Softmax(w) }}"
    return parse(f"{text} {body}", fill=np.float32(-1e4), axes=np.array([1, 2]), zero=np.array(0), one=np.array(1))


@pytest.mark.parametrize(
    ("declared", "made"),
    [
        ("int64[{b},6]", "u = Unsqueeze(m, axes) c = Cast<to = 9>(u)"),
        ("int64[{b},6]", "e = Equal(m, one) c = Unsqueeze(e, axes)"),
        ("int64[{b},1,1,6]", "c = Greater(m, zero)"),
        ("bool[{b},1,6,6]", "c = Identity(m)"),
    ],
)
@pytest.mark.parametrize("batch", ["b", "1"])
def test_masks_of_any_form_come_in_every_style(batch: str, declared: str, made: str) -> None:
    verifier = Verifier(masked(batch, declared.format(b=batch), made))
    verifier.prepare()
    assert set(verifier.coverage.masks) == set(STYLES)
    rows = [row.reshape(-1, 6) for case in verifier.cases for row in case.arrays["m"].astype(bool)]
    assert any(not row.any() for row in rows), "an empty row"
    assert any(row.all() for row in rows), "a full row"
    assert any((~row[:, 0]).all() and row[:, -1].all() for row in rows), "left padding"
    assert any((row.sum(-1) == 1).all() and row[:, 0].all() for row in rows), "one token"


def test_an_additive_mask_is_known_behind_moves() -> None:
    text = "g (float[b,4,6] x, float[b,1,6] m) => (float[b,4,6] y) { a = Add(x, m) r = Identity(a) y = Softmax(r) }"
    model = parse(text)
    assert role_of(model.graph.inputs[1]).kind == "additive_mask"


def test_a_number_for_pads_is_fed_in_every_style() -> None:
    text = "g (int64[b,6] ids, float[b,6] x) => (float[b,6] y) { p = Equal(ids, pad) y = Where(p, nil, x) }"
    model = parse(text, pad=np.array(7), nil=np.float32(0))
    assert compared_with(model.graph.inputs[0]) == (7.0,)
    verifier = Verifier(model)
    verifier.prepare()
    assert set(verifier.coverage.masks) == set(STYLES), "pads in every style"
    assert any((row == 7).all() for case in verifier.cases for row in case.arrays["ids"])


def test_sizes_are_none_one_and_several() -> None:
    verifier = Verifier(parse("g (float[b,8] x) => (float[b,8] y) { y = Tanh(x) }"))
    verifier.prepare()
    assert verifier.coverage.sizes == ("b: 0, 1, 2, 3, 7",)
    assert any(case.values == "tiny values" for case in verifier.cases)


def test_what_the_user_gave_is_resized_and_told_apart() -> None:
    model = parse("g (float[b,s] x, int64[b,s] mask) => (float[b,s] y) { c = Cast<to = 9>(mask) y = Where(c, x, x) }")
    given = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "mask": np.ones((2, 4), np.int64)}
    verifier = Verifier(model, inputs=given)
    verifier.prepare()
    assert (verifier.coverage.given, verifier.coverage.random) == (1, 0)
    assert verifier.coverage.derived >= 3
    assert len({case.sizes["s"] for case in verifier.cases}) > 1
    for case in verifier.cases:
        assert set(case.arrays["x"].reshape(-1)) <= set(range(8)), "no number that the user did not give"
        assert case.arrays["x"].shape == case.arrays["mask"].shape
    assert set(verifier.coverage.masks) == set(STYLES)


def test_a_mask_of_one_row_follows_the_first_style() -> None:
    rng = np.random.default_rng(0)
    assert not mask(rng, (4,), ("empty",)).any()
    assert mask(rng, (), ("empty",)).shape == ()
    assert mask(rng, (2, 0), STYLES).shape == (2, 0)


BRANCH = """g (float[4,8] x) => (float[4,8] y) {{ s = ReduceSum<keepdims = 0>(x) c = Greater(s, limit)
    y = If (c) <then_branch = t () => (float[4,8] a) {{ m = ReduceMax<keepdims = 0>(x) d = Less(m, low)
            a = If (d) <then_branch = tt () => (float[4,8] aa) {{ aa = {first}(x) }},
                        else_branch = te () => (float[4,8] ab) {{ ab = {second}(x) }}> }},
        else_branch = e () => (float[4,8] b) {{ b = Tanh(x) }}> }}"""


def branching(limit: float, first: str = "Sigmoid", second: str = "Relu") -> ir.Model:
    return parse(BRANCH.format(first=first, second=second), limit=np.float32(limit), low=np.float32(60))


def test_inputs_are_found_that_reach_every_branch() -> None:
    verifier = Verifier(branching(500.0))
    verifier.prepare()
    assert (verifier.coverage.branches, verifier.coverage.reached) == (4, 4)


def test_a_watch_sees_nested_branches() -> None:
    model = branching(500.0)
    watch = Watch(model)
    (outputs,) = run_model(watch.model, [{"x": np.full((4, 8), 50, np.float32)}])
    assert watch.reached(outputs) == {("y", True), ("a", True)}
    (outputs,) = run_model(watch.model, [{"x": np.zeros((4, 8), np.float32)}])
    assert watch.reached(outputs) == {("y", False)}


def test_a_branch_that_nothing_reaches_is_compared_by_force() -> None:
    reference = branching(np.inf)
    found = verify(reference, branching(np.inf))
    assert found.ok and found.coverage.reached < found.coverage.branches == 4
    assert found.coverage.forced >= 1
    wrong = verify(reference, branching(np.inf, first="Tanh", second="Tanh"))
    assert wrong.state == "failed" or wrong.coverage.unreached


def test_a_branch_that_is_gone_is_named_in_a_note() -> None:
    reference = parse(BRANCH.format(first="Sigmoid", second="Sigmoid"), limit=np.float32(np.inf), low=np.float32(60))
    candidate = parse("g (float[4,8] x) => (float[4,8] y) { y = Tanh(x) }")
    found = verify(reference, candidate)
    assert found.ok
    assert any("no input reached the then-branch" in note for note in found.notes)
    assert len(branches(reference)) == 4 and forced(candidate, ("y", True)) is None


def test_the_file_as_it_came_is_the_reference(tmp_path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float[2,4] x) => (float[2,4] y) { y = Tanh(x) }'
    proto = onnx.parser.parse_model(text)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    captured = capture_onnx(path)
    wrongly = parse("g (float[2,4] x) => (float[2,4] y) { y = Sigmoid(x) }")
    for source in (path, path.read_bytes(), proto, ir.from_proto(proto)):
        assert verify(captured, captured, oracle=OriginalModel(source)).ok
        assert verify(wrongly, wrongly, oracle=OriginalModel(source)).state == "failed"


def test_a_file_that_does_not_run_leaves_the_captured_model_and_says_so() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17, "none" : 1]> g (float[2] x) => (float[2] y) { y = none.Nothing(x) }'
    )
    captured = parse("g (float[2] x) => (float[2] y) { y = Tanh(x) }")
    with Reference(captured, OriginalModel(proto)) as reference:
        assert reference.is_captured and "the file as it came does not run" in reference.name


def test_what_the_runtime_has_no_kernel_for_is_run_by_another() -> None:
    model = parse("g (double[2,4] x) => (double[2,4] y) { y = Erf(x) }")
    x = np.linspace(-1, 1, 8).reshape(2, 4)
    (found,) = run_anywhere(model, [{"x": x}])
    assert found["y"].dtype == np.float64
    assert found["y"][1, 3] == pytest.approx(0.8427007929497149, rel=1e-12)
    assert "no kernel" in _oracle_of(model)


def _oracle_of(model: ir.Model) -> str:
    verifier = Verifier(model)
    verifier.prepare()
    return verifier.coverage.oracle


@pytest.mark.parametrize("operator", ["GRU", "LSTM"])
def test_a_recurrent_layer_is_verified_without_ending_the_process(operator: str) -> None:
    """In a process of its own: ONNX Runtime ends its process on a batch of none."""
    rows = {"GRU": 12, "LSTM": 16}[operator]
    program = f"""
import numpy as np, onnx, xform
text = '''<ir_version: 8, opset_import: ["" : 17]> g (float[3,N,4] x) => (float[3,1,N,4] y)
    <float[1,{rows},4] w = {{{",".join(["0.5"] * rows * 4)}}}> {{ y = {operator}<hidden_size=4>(x, w, w) }}'''
print(xform.optimize(onnx.parser.parse_model(text)).report.verification.passed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_masks_are_tried_at_the_length_of_the_user_and_on_short_sequences_where_the_model_takes_those() -> None:
    rng = np.random.default_rng(8)
    given = {"ids": rng.integers(0, 9, (1, 40)), "attention_mask": np.ones((1, 40), np.int64)}
    inputs = "g (int64[batch,seq] ids, int64[batch,seq] attention_mask) => (float[batch,seq] y)"
    masked = "f = Cast<to = 1>(ids) m = Cast<to = 1>(attention_mask) a = Mul(f, m)"
    free = parse(f"{inputs} {{ {masked} y = Relu(a) }}")
    # rows of 40: sequences of 16 fit into none
    bound = parse(f"{inputs} {{ {masked} b = Reshape(a, rows) s = Shape(a) y = Reshape(b, s) }}", rows=[-1, 40])
    for model, expected in ((free, {40, 16}), (bound, {40})):
        verifier = Verifier(model, inputs=given)
        verifier.prepare()
        lengths = {case.sizes["seq"] for case in verifier.cases if case.masks}
        assert lengths == expected and verifier.coverage.masks == STYLES


def test_a_mask_that_is_forgotten_behind_the_first_tokens_is_found() -> None:
    given = {"x": np.random.default_rng(9).normal(size=(2, 40)).astype(np.float32), "mask": np.ones((2, 40), np.int64)}
    inputs = "g (float[batch,seq] x, int64[batch,seq] mask) => (float[batch,seq] y)"
    right = parse(f"{inputs} {{ m = Cast<to = 1>(mask) y = Mul(x, m) }}")
    ordered = "h = Slice(mask, zero, early, one) t = Slice(mask, early, end, one) e = Equal(t, t) o = Cast<to = 7>(e)"
    wrong = parse(
        f"{inputs} {{ {ordered} c = Concat<axis = 1>(h, o) m = Cast<to = 1>(c) y = Mul(x, m) }}",
        zero=[0], early=[16], end=[1 << 40], one=[1],
    )  # fmt: skip
    found = Verifier(right, inputs=given).compare(wrong)
    assert found.state == "failed"


def test_a_table_that_ends_at_the_length_of_the_user_is_found() -> None:
    given = {"x": np.random.default_rng(9).normal(size=(2, 40)).astype(np.float32)}
    start = "g (float[batch,seq] x) => (float[batch,seq] y) { s = Shape(x) n = Gather(s, one) p = Range(zero, n, one)"
    numbers = {"zero": 0, "one": 1, "last": 39}
    right = parse(f"{start} f = Cast<to = 1>(p) y = Add(x, f) }}", **numbers)
    wrong = parse(f"{start} q = Min(p, last) f = Cast<to = 1>(q) y = Add(x, f) }}", **numbers)
    assert Verifier(right, inputs=given).compare(wrong).state == "failed"
