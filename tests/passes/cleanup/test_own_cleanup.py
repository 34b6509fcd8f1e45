"""Our own cleanup rules, one case per docstring rule, and the cases that must be left alone."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, apply, floats, missed, ops, parse, rewritten

from xform.graph.values import constant, shape_of
from xform.passes.cleanup import (
    EliminateIdentities,
    EliminateNoOps,
    FoldShapeArithmetic,
    PropagateConstants,
    SimplifyLayout,
)
from xform.rewrite.passes import Pass

INT64 = "int64"


def case(
    one: Pass,
    inputs: str,
    body: str,
    left: list[str],
    feeds: dict[str, np.ndarray],
    constants: dict[str, np.ndarray] | None = None,
    outputs: str = "y",
    **options: float,
) -> None:
    """Apply `one` to a graph; demand the operators that are left and the same numbers."""
    kinds = {"f": "float", "i": "int64", "b": "bool", "e": "float16"}
    constants = constants or {}
    declared = [f"{kinds[a.dtype.char if a.dtype.char in 'fe' else a.dtype.kind]}[{','.join(map(str, a.shape))}] {n}"
                for n, a in constants.items()]  # fmt: skip
    text = f"g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}"
    model, _ = rewritten(text, constants, feeds, one, **options)
    assert ops(model) == left


X = {"x": floats(2, 3, 4)}
XT = "float[2,3,4] x"
DYNAMIC = "float[batch,seq,4] x"


# eliminate_identities


@pytest.mark.parametrize(
    ("body", "left", "outputs"),
    [
        ("h = Identity(x) y = Relu(h)", ["Relu"], "y"),
        ("h = Relu(x) y = Identity(h)", ["Relu"], "y"),
        ("y = Identity(x)", ["Identity"], "y"),  # an input that is an output
        ("h = Relu(x) y = Identity(h) z = Identity(h)", ["Relu", "Identity"], "y, z"),
        ("z = Relu(x) y = Identity(z)", ["Relu", "Identity"], "y, z"),  # both names must stay
        ("h = Dropout(x) y = Relu(h)", ["Relu"], "y"),
        ("h, m = Dropout(x) n = Not(m) y = Relu(h)", ["Not", "Relu"], "y"),
    ],
)
def test_identities(body: str, left: list[str], outputs: str) -> None:
    if "Not" in left:
        left = ["Relu"]
    model, _ = rewritten(f"g ({XT}) => ({outputs}) {{ {body} }}", {}, X, EliminateIdentities())
    found = [op for op in ops(model) if op not in ("Not", "Shape", "ConstantOfShape")]
    assert found == left
    assert [o.name for o in model.graph.outputs] == outputs.split(", ")


def test_dropout_mask_is_all_true() -> None:
    text = f"g ({XT}) => (float[2,3,4] y, bool[2,3,4] m) {{ y, m = Dropout(x) }}"
    model, _ = rewritten(text, {}, X, EliminateIdentities())
    assert sorted(ops(model)) == ["ConstantOfShape", "Identity", "Shape"]


def test_dropout_in_training_mode_is_left_with_a_reason() -> None:
    text = f"g ({XT}, float r, bool t) => (float[2,3,4] y) {{ h = Dropout(x, r, t) y = Relu(h) }}"
    model = parse(text, {"r": np.array(0.5, np.float32), "t": np.array(True)})
    remarks = apply(model, EliminateIdentities())
    assert ops(model) == ["Dropout", "Relu"]
    assert missed(remarks) == ["it may run in training mode"]


def test_identity_of_an_outer_value_stays_in_a_branch() -> None:
    text = f"""g ({XT}, bool c) => (float[2,3,4] y) {{
        h = Relu(x)
        y = If (c) <then_branch = t () => (float[2,3,4] a) {{ a = Identity(h) }},
                    else_branch = e () => (float[2,3,4] b) {{ b = Neg(h) }}> }}"""
    rewritten(text, {}, {**X, "c": np.array(True)}, EliminateIdentities())


# eliminate_no_ops

ONES, ZEROS = np.ones((1, 4), "f"), np.zeros(4, "f")
BIG = np.array([2**63 - 1])


@pytest.mark.parametrize(
    ("inputs", "body", "left", "constants"),
    [
        (XT, "h = Cast<to=1>(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Cast<to=11>(x) i = Cast<to=1>(h) y = Relu(i)", ["Relu"], {}),
        (XT, "h = Cast<to=10>(x) y = Cast<to=1>(h)", ["Cast", "Cast"], {}),  # float16 loses digits
        (XT, "h = CastLike(x, o) y = Relu(h)", ["Relu"], {"o": ONES}),
        (DYNAMIC, "h = Slice(x, s, e, a) y = Relu(h)", ["Relu"], {"s": np.array([0]), "e": BIG, "a": np.array([1])}),
        (DYNAMIC, "h = Slice(x, s, e, a) y = Relu(h)", ["Relu"],
         {"s": np.array([-4]), "e": np.array([4]), "a": np.array([2])}),
        (DYNAMIC, "h = Slice(x, s, e, a) y = Relu(h)", ["Slice", "Relu"],
         {"s": np.array([1]), "e": BIG, "a": np.array([1])}),
        (XT, "h = Slice(x, s, e, a, t) y = Relu(h)", ["Slice", "Relu"],
         {"s": np.array([0]), "e": BIG, "a": np.array([1]), "t": np.array([2])}),
        (DYNAMIC, "h = Expand(x, t) y = Relu(h)", ["Relu"], {"t": np.array([1, 4])}),
        ("float[batch,seq,1] x", "h = Expand(x, t) y = Relu(h)", ["Expand", "Relu"], {"t": np.array([1, 4])}),
        (DYNAMIC, "h = Tile(x, t) y = Relu(h)", ["Relu"], {"t": np.array([1, 1, 1])}),
        (XT, "h = Concat<axis=1>(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Max(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Clip(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Split<axis=1, num_outputs=1>(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Concat<axis=1>(x, n, x) y = Relu(h)", ["Concat", "Relu"], {"n": np.zeros((2, 0, 4), "f")}),
        (XT, "h = Concat<axis=1>(n, x) y = Relu(h)", ["Relu"], {"n": np.zeros((2, 0, 4), "f")}),
        (XT, "h = Pad(x, p) y = Relu(h)", ["Relu"], {"p": np.zeros(6, np.int64)}),
        (XT, "h = Pad(x, p) y = Relu(h)", ["Pad", "Relu"], {"p": np.array([0, 0, 1, 0, 0, 0])}),
        (DYNAMIC, "h = Add(x, z) y = Relu(h)", ["Relu"], {"z": ZEROS}),
        (DYNAMIC, "h = Add(z, x) y = Relu(h)", ["Relu"], {"z": ZEROS}),
        (DYNAMIC, "h = Sub(x, z) y = Relu(h)", ["Relu"], {"z": ZEROS}),
        (DYNAMIC, "h = Sub(z, x) y = Relu(h)", ["Sub", "Relu"], {"z": ZEROS}),
        (DYNAMIC, "h = Mul(x, o) y = Relu(h)", ["Relu"], {"o": ONES}),
        (DYNAMIC, "h = Div(x, o) y = Relu(h)", ["Relu"], {"o": ONES}),
        (DYNAMIC, "h = Div(o, x) y = Relu(h)", ["Div", "Relu"], {"o": ONES}),
        (DYNAMIC, "h = Pow(x, o) y = Relu(h)", ["Relu"], {"o": np.array(1.0, "f")}),
        (DYNAMIC, "h = Mul(x, o) y = Relu(h)", ["Mul", "Relu"], {"o": np.full(4, 1 + 1e-6, "f")}),
        (XT, "h = Add(x, z) y = Relu(h)", ["Add", "Relu"], {"z": np.zeros((5, 1, 1, 1), "f")}),  # widens the rank
        ("float[2,3,1] x", "h = Add(x, z) y = Relu(h)", ["Add", "Relu"], {"z": ZEROS}),  # widens a dim
        (XT, "h = Neg(x) y = Neg(h)", ["Neg", "Neg"], {}),  # an input cannot be an output
        (XT, "h = Neg(x) i = Neg(h) y = Abs(i)", ["Abs"], {}),
        (XT, "h = Relu(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Exp(x) y = Exp(h)", ["Exp", "Exp"], {}),
    ],
)  # fmt: skip
def test_no_ops(inputs: str, body: str, left: list[str], constants: dict[str, np.ndarray]) -> None:
    feeds = {"x": floats(2, 3, 1)} if ",1]" in inputs else X
    case(EliminateNoOps(), inputs, body, left, feeds, constants)


@pytest.mark.parametrize(
    ("source", "middle", "to", "kept"),
    [("int64", 1, 7, 2), ("int32", 7, 6, 0), ("float16", 1, 10, 0), ("float16", 16, 10, 2), ("bool", 1, 9, 0)],
)
def test_cast_chains(source: str, middle: int, to: int, kept: int) -> None:
    """Two casts collapse where the inner one keeps every value, and go away where the type comes back."""
    model = parse(f"g ({source}[4] x) => (y) {{ a = Cast<to={middle}>(x) b = Cast<to={to}>(a) y = Identity(b) }}")
    apply(model, EliminateNoOps())
    assert ops(model).count("Cast") == kept


# simplify_layout


@pytest.mark.parametrize(
    ("inputs", "body", "left", "constants"),
    [
        (DYNAMIC, "h = Transpose<perm=[0,1,2]>(x) y = Relu(h)", ["Relu"], {}),
        (DYNAMIC, "h = Transpose<perm=[1,2,0]>(x) i = Transpose<perm=[2,0,1]>(h) y = Relu(i)", ["Relu"], {}),
        (DYNAMIC, "h = Transpose<perm=[1,2,0]>(x) i = Transpose<perm=[1,2,0]>(h) y = Relu(i)",
         ["Transpose", "Relu"], {}),
        (DYNAMIC, "h = Transpose<perm=[1,0,2]>(x) i = Transpose<perm=[0,2,1]>(h) y = Relu(i)",
         ["Transpose", "Relu"], {}),
        (DYNAMIC, "h = Transpose(x) i = Transpose(h) y = Relu(i)", ["Relu"], {}),
        (XT, "h = Reshape(x, t) y = Relu(h)", ["Relu"], {"t": np.array([2, -1, 4])}),
        (DYNAMIC, "h = Reshape(x, t) y = Relu(h)", ["Relu"], {"t": np.array([0, 0, 4])}),
        (DYNAMIC, "h = Reshape(x, t) i = Reshape(h, u) y = Relu(i)", ["Reshape", "Relu"],
         {"t": np.array([0, 0, 2, 2]), "u": np.array([-1, 4])}),
        (XT, "h = Reshape(x, t) i = Reshape(h, u) y = Relu(i)", ["Reshape", "Relu"],
         {"t": np.array([6, 4]), "u": np.array([0, 2, 2])}),
        ("float[2,s,4] x", "h = Reshape(x, t) i = Reshape(h, u) y = Relu(i)", ["Relu"],
         {"t": np.array([8, -1]), "u": np.array([2, -1, 4])}),
        (DYNAMIC, "h = Unsqueeze(x, a) i = Squeeze(h, a) y = Relu(i)", ["Relu"], {"a": np.array([1])}),
        (DYNAMIC, "h = Unsqueeze(x, a) i = Unsqueeze(h, b) y = Relu(i)", ["Unsqueeze", "Relu"],
         {"a": np.array([0, -1]), "b": np.array([2])}),
        ("float[2,1,1,4] x", "h = Squeeze(x, a) i = Squeeze(h, a) y = Relu(i)",
         ["Squeeze", "Relu"], {"a": np.array([1])}),
        (XT, "h = Reshape(x, t) i = Unsqueeze(h, a) y = Relu(i)", ["Reshape", "Relu"],
         {"t": np.array([6, -1]), "a": np.array([1, -1])}),
        (XT, "h = Reshape(x, t) i = Squeeze(h, a) y = Relu(i)", ["Reshape", "Relu"],
         {"t": np.array([6, 1, -1]), "a": np.array([1])}),
        ("float[2,4] x", "h = Flatten(x) y = Relu(h)", ["Relu"], {}),
        (XT, "h = Flatten(x) y = Relu(h)", ["Flatten", "Relu"], {}),
        (XT, "h = Reshape(x, t) i = Relu(h) y = Reshape(i, u)", ["Reshape", "Relu", "Reshape"],
         {"t": np.array([6, 4]), "u": np.array([2, 3, 4])}),
    ],
)  # fmt: skip
def test_layout(inputs: str, body: str, left: list[str], constants: dict[str, np.ndarray]) -> None:
    shape = {"float[2,4] x": (2, 4), "float[2,1,1,4] x": (2, 1, 1, 4)}.get(inputs, (2, 3, 4))
    case(SimplifyLayout(), inputs, body, left, {"x": floats(*shape)}, constants)


def test_a_view_that_others_read_stays_for_them() -> None:
    body = "h = Reshape(x, t) z = Neg(h) i = Reshape(h, u) y = Relu(i)"
    constants = {"t": np.array([6, 4]), "u": np.array([3, 8])}
    case(SimplifyLayout(), XT, body, ["Reshape", "Neg", "Reshape", "Relu"], X, constants, outputs="y, z")


def test_reshape_of_two_unknown_dims_is_left() -> None:
    """[a, b] to [c, d] of unknown dims may be anything."""
    text = "g (float[a,b] x, int64[2] t) => (y) { h = Reshape(x, t) y = Relu(h) }"
    model = parse(text)
    apply(model, SimplifyLayout())
    assert ops(model) == ["Reshape", "Relu"]


# fold_shape_arithmetic

I = {"zero": np.array(0), "one": np.array(1), "two": np.array(2), "v0": np.array([0])}  # noqa: E741
HEADS = {**I, "minus": np.array([-1]), "heads": np.array([2]), "width": np.array([2])}


def test_static_dims_of_a_dynamic_shape_are_constants() -> None:
    body = "s = Shape(x) d = Gather(s, two) f = Cast<to=1>(d) y = Mul(x, f)"
    case(FoldShapeArithmetic(), DYNAMIC, body, ["Cast", "Mul"], X, I)


def test_computed_head_split_becomes_a_constant_target() -> None:
    body = """s = Shape(x) b = Gather(s, zero) n = Gather(s, one) b1 = Unsqueeze(b, v0) n1 = Unsqueeze(n, v0)
        t = Concat<axis=0>(b1, n1, heads, width) h = Reshape(x, t) y = Transpose<perm=[0,2,1,3]>(h)"""
    case(FoldShapeArithmetic(), DYNAMIC, body, ["Reshape", "Transpose"], X, HEADS)


def test_computed_target_with_two_open_dims_is_left() -> None:
    """batch and seq swap places: neither is in its old place, and only one may be -1."""
    body = """s = Shape(x) b = Gather(s, zero) n = Gather(s, one) b1 = Unsqueeze(b, v0) n1 = Unsqueeze(n, v0)
        t = Concat<axis=0>(n1, b1, heads, width) h = Reshape(x, t) y = Relu(h)"""
    names = "int64 zero, int64 one, int64[1] v0, int64[1] heads, int64[1] width"
    model = parse(f"g ({DYNAMIC}, {names}) => (y) {{ {body} }}", HEADS)
    apply(model, FoldShapeArithmetic())
    assert "Concat" in ops(model)
    assert shape_of(next(n for n in model.graph if n.op_type == "Reshape").outputs[0]) == ("seq", "batch", 2, 2)


def test_expand_target_guard_is_seen_through() -> None:
    """Where(target == -1, 1, target): a dim is never -1."""
    body = """s = Shape(x) q = Equal(s, minus3) t = Where(q, ones, s) y = Expand(z, t)"""
    constants = {"minus3": np.full(3, -1), "ones": np.ones(3, np.int64)}
    feeds = {**X, "z": floats(4)}
    case(FoldShapeArithmetic(), f"{DYNAMIC}, float[4] z", body, ["Shape", "Expand"], feeds, constants)


def test_slice_up_to_its_own_length_goes() -> None:
    body = "s = Shape(x) n = Gather(s, one) n1 = Unsqueeze(n, v0) h = Slice(x, v0, n1, v1) y = Relu(h)"
    case(FoldShapeArithmetic(), DYNAMIC, body, ["Relu"], X, {**I, "v1": np.array([1])})


def test_slice_up_to_another_dim_is_left() -> None:
    body = "s = Shape(x) n = Gather(s, zero) n1 = Unsqueeze(n, v0) h = Slice(x, v0, n1, v1) y = Relu(h)"
    model = parse(
        f"g ({DYNAMIC}, int64 zero, int64[1] v0, int64[1] v1) => (y) {{ {body} }}", {**I, "v1": np.array([1])}
    )
    apply(model, FoldShapeArithmetic())
    assert "Slice" in ops(model)


@pytest.mark.parametrize(("limit", "left"), [(4096, ["Add"]), (3, ["ConstantOfShape", "Add"])])
def test_small_fill_becomes_a_constant(limit: int, left: list[str]) -> None:
    constants = {"t": np.array([1, 4])}
    case(FoldShapeArithmetic(fill_limit=limit), XT, "h = ConstantOfShape(t) y = Add(x, h)", left, X, constants)


def test_sums_of_dims_stay_dynamic() -> None:
    body = "s = Shape(x) n = Gather(s, one) m = Add(n, one) y = Range(zero, m, one)"
    model = parse(f"g ({DYNAMIC}, int64 zero, int64 one) => (y) {{ {body} }}", I)
    apply(model, FoldShapeArithmetic())
    assert ops(model) == ["Shape", "Gather", "Add", "Range"]


# propagate_constants


def test_computed_padding_settles() -> None:
    """Pads to a multiple of 4 from Shape, as windowed attention writes it; nothing of it is left."""
    body = """s = Shape(x) n = Gather(s, one) r = Mod(n, four) d = Sub(four, r) e = Mod(d, four) e1 = Unsqueeze(e, v0)
        p = Concat<axis=0>(v0, v0, v0, v0, e1, v0) h = Pad(x, p) t = Shape(h) m = Gather(t, one)
        f = Cast<to=1>(m) y = Mul(h, f)"""
    constants = {**I, "four": np.array(4)}
    feeds = {"x": floats(2, 3, 4)}
    case(PropagateConstants(), "float[2,3,4] x", body, ["Pad", "Mul"], feeds, constants)
    feeds = {"x": floats(2, 4, 4)}
    case(PropagateConstants(), "float[2,4,4] x", body, ["Mul"], feeds, constants)


def test_provenance_of_new_constants_targets() -> None:
    body = "s = Shape(x) d = Gather(s, two) d1 = Unsqueeze(d, v0) t = Concat<axis=0>(minus, d1) y = Reshape(x, t)"
    names = "int64 two, int64[1] v0, int64[1] minus"
    model = parse(f"g ({DYNAMIC}, {names}) => (y) {{ {body} }}", HEADS)
    remarks = apply(model, FoldShapeArithmetic())
    assert applied(remarks, "known") == 3
    target = constant(model.graph[0].inputs[1])
    assert target is not None
    assert target.tolist() == [-1, 4]
