"""Random inputs: seeded, in range, with one number per dynamic dim."""

from __future__ import annotations

from itertools import islice

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xform.errors import UsageError
from xform.pipeline.input_roles import Role, role_of
from xform.pipeline.random_inputs import candidate_cases, check_named, random_inputs
from xform.pipeline.sizes import evaluate, input_dims, meaning_of, proposals


def parse(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def role(text: str, name: str = "x", **weights: np.ndarray) -> Role:
    model = parse(text, **weights)
    return role_of(next(value for value in model.graph.inputs if value.name == name))


EMBEDDING = np.zeros((50, 4), np.float32)


def test_same_seed_same_numbers(planted):
    model = planted.chain()
    first, again, other = random_inputs(model, 1), random_inputs(model, 1), random_inputs(model, 2)
    assert np.array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])


def test_gather_bounds_the_index():
    assert role("g (int64[N] x) => (float[N,4] y) { y = Gather(w, x) }", w=EMBEDDING) == Role("index", 50)
    text = "g (int64[N] x) => (float[N,1,4] y) { a = Cast<to=7>(x) b = Unsqueeze(a, one) y = Gather(w, b) }"
    assert role(text, w=EMBEDDING, one=np.array([1])) == Role("index", 50)


def test_offset_before_the_gather_counts():
    text = "g (int64[N] x) => (float[N,4] y) { a = Add(x, two) y = Gather(w, a) }"
    assert role(text, w=EMBEDDING, two=np.array(2)) == Role("index", 48)


def test_smallest_table_wins():
    text = "g (int64[N] x) => (float[N,4] y) { a = Gather(w, x) b = Gather(v, x) y = Add(a, b) }"
    assert role(text, w=EMBEDDING, v=EMBEDDING[:2]) == Role("index", 2)


@pytest.mark.parametrize(
    "body",
    [
        "b = Cast<to=9>(x) y = Not(b)",
        "f = Cast<to=1>(x) o = Sub(one, f) y = Cast<to=9>(o)",
        "b = Cast<to=9>(x) y = Identity(b)",
    ],
)
def test_masks_by_use(body):
    found = role(f"g (int64[B,S] x) => (bool[B,S] y) {{ {body} }}", one=np.float32(1))
    assert found == Role("mask")


def test_additive_mask_by_use():
    text = "g (float[B,S] x, float[B,S] s) => (float[B,S] y) { a = Add(s, x) y = Softmax(a) }"
    assert role(text, "x").kind == "additive_mask"


def test_names_where_structure_says_nothing():
    text = "g (int64[N] NAME) => (int64[N] y) { y = Identity(NAME) }"
    assert role(text.replace("NAME", "attention_mask"), "attention_mask") == Role("mask")
    assert role(text.replace("NAME", "token_type_ids"), "token_type_ids") == Role("index", 2)
    assert role(text.replace("NAME", "input_ids"), "input_ids") == Role("index", None)
    assert role(text.replace("NAME", "whatever"), "whatever") == Role("plain")


def test_values_respect_roles():
    text = """g (int64[batch,sequence] ids, int64[batch,sequence] attention_mask, float[batch,sequence] z,
            bool[batch] f)
        => (float[batch,sequence,4] y) { y = Gather(w, ids) }"""
    inputs = random_inputs(parse(text, w=EMBEDDING))
    assert inputs["ids"].dtype == np.int64 and inputs["ids"].min() >= 0 and inputs["ids"].max() < 50
    mask = inputs["attention_mask"]
    assert set(np.unique(mask)) == {0, 1}
    assert (mask.max(axis=1) == 1).all() and (mask[0] == 1).all()
    assert inputs["z"].dtype == np.float32 and inputs["z"].std() > 0.3
    assert inputs["f"].dtype == bool
    assert inputs["ids"].shape == mask.shape == inputs["z"].shape


def test_unsigned_bytes_use_the_whole_range():
    inputs = random_inputs(parse("g (uint8[64,64] x) => (uint8[64,64] y) { y = Identity(x) }"))
    assert inputs["x"].max() > 200


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x": np.ones(2, bool)}, "input 'x' is float32, but an array of bool"),
        ({"x": np.array([1.0, 1e300])}, "input 'x' is float32, but an array of float64"),
        ({"i": np.array([1, 2**40])}, "input 'i' is int32, but an array of int64"),
    ],
)
def test_inputs_that_do_not_fit_the_dtype(given, told):
    model = parse("g (float[n] x, int32[n] i) => (float[n] y, int32[n] z) { y = Identity(x) z = Identity(i) }")
    with pytest.raises(UsageError, match=told):
        check_named(model, given)


def test_two_sizes_consistent_across_inputs(planted):
    text = "g (float[batch,sequence] a, float[sequence,batch] b) => (float[batch,batch] y) { y = MatMul(a, b) }"
    first, second = islice(candidate_cases(parse(text)), 2)
    assert first.arrays["a"].shape == first.arrays["b"].shape[::-1]
    assert first.arrays["a"].shape != second.arrays["a"].shape
    assert set(first.sizes) == {"batch", "sequence"}


def test_cached_lengths_add_up():
    text = """g (float[batch,past_sequence_length] a, float[batch,sequence_length] b,
        float[batch,total_sequence_length] c,
        float[batch,"past_sequence_length + sequence_length"] d) => (float[batch,1] y) { y = Identity(a) }"""
    for case in islice(candidate_cases(parse(text)), 3):
        lengths = {name: array.shape[1] for name, array in case.arrays.items()}
        assert lengths["c"] == lengths["d"] == lengths["a"] + lengths["b"]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("batch", "batch"), ("batch_size", "batch"), ("N", "batch"), ("seq_len", "sequence"), ("sequence", "sequence"),
        ("past_length", "past"), ("height", "space"), ("channels", "channels"), ("num_heads", "heads"), ("q", "other"),
    ],
)  # fmt: skip
def test_meanings(name, meaning):
    assert meaning_of(name) == meaning


def test_unnamed_dims_get_their_meaning_from_their_place():
    model = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Identity(x) }")
    model.graph.inputs[0].shape = ir.Shape([None, 3, "s1", "s2"])
    sizes = next(proposals(input_dims(model.graph.inputs)))
    assert sizes == {"?batch": 2, "s1": 64, "s2": 64}


def test_expressions():
    assert evaluate("a + 2*b", {"a": 3, "b": 4}) == 11
    assert evaluate("(a - 1)//2", {"a": 8}) == 3
    with pytest.raises(KeyError):
        evaluate("a", {})


def test_sizes_of_the_user(planted):
    assert random_inputs(planted.chain(), sizes={"batch": 9})["x"].shape == (9, 8)
    with pytest.raises(UsageError, match="no dynamic dimension named 'bitch'"):
        random_inputs(planted.chain(), sizes={"bitch": 9})


def test_inputs_of_the_user_decide_the_sizes_of_the_others():
    text = "g (float[batch,4] a, float[batch,4] b) => (float[batch,4] y) { y = Add(a, b) }"
    given = np.ones((7, 4), np.float32)
    inputs = random_inputs(parse(text), overrides={"a": given})
    assert inputs["a"].dtype == np.float32 and (inputs["a"] == 1).all()
    assert inputs["b"].shape == (7, 4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"X": np.ones((2, 8), np.float32)}, "no input named 'X'"),
        ({"x": np.ones((2, 9), np.float32)}, "shape"),
        ({"x": np.ones((2, 8), np.complex64)}, "float32"),
        ({"x": np.ones((2, 8))}, r"(?s)array of float64.*astype\('float32'\)"),
        ({"x": np.ones((2, 8), np.uint8)}, "array of uint8"),
    ],
)
def test_wrong_inputs_of_the_user(planted, given, text):
    with pytest.raises(UsageError, match=text):
        random_inputs(planted.chain(), overrides=given)


def test_torch_tensors_are_taken(planted):
    torch = pytest.importorskip("torch")
    inputs = random_inputs(planted.chain(), overrides={"x": torch.ones(2, 8)})
    assert isinstance(inputs["x"], np.ndarray)


def test_overridable_initializers_are_not_asked_for():
    model = parse("g (float[2,4] x, float[4] w) => (float[2,4] y) { y = Add(x, w) }", w=np.ones(4, np.float32))
    assert set(random_inputs(model)) == {"x"}


def test_sequence_input():
    model = parse("g (seq(float[2]) x) => (float[N] y) { y = ConcatFromSequence<axis=0>(x) }")
    value = random_inputs(model)["x"]
    assert isinstance(value, list) and value[0].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("9**9**9**9", OverflowError), ("9**62 * a", OverflowError), ("a // 0", ZeroDivisionError),
        ("a % (a - a)", ZeroDivisionError), ("'x' * 9", KeyError), ("1e999", KeyError), ("True + a", KeyError),
        ("(" * 900 + "a" + ")" * 90, KeyError), ("+".join(["a"] * 2000), KeyError), ("9" * 900, KeyError),
        ("a + \0", KeyError), ("a.b", KeyError), ("b + 1", KeyError),
    ],
)  # fmt: skip
def test_expressions_that_have_no_value(name, error):
    with pytest.raises(error):
        evaluate(name, {"a": 7})
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape([name, 4])
    for case in islice(candidate_cases(model), 2):  # a name that is no expression is a symbol, others fit no size
        assert error is KeyError and case.arrays["x"].shape[1] == 4
