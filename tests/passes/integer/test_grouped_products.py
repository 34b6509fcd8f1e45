"""Products in int8 with scales by groups of channels, found at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import applied, apply, declared, missed, ops, parse, run

from xform.errors import UsageError
from xform.graph.channel_groups import group_of
from xform.graph.clone import clone
from xform.passes.integer import QuantizeStatic
from xform.passes.integer.grouped_products import finer_groups, widest_group
from xform.passes.integer.weight_codes import asymmetric_codes, compensated_asymmetric_codes
from xform.rewrite.passes import PassContext

RNG = np.random.default_rng(0)
TEXT = "g (float[2,9,{k}] x) => (float[2,9,80] y) {{ m = MatMul(x, w) y = Add(m, b) }}"
CODES = ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
SCALES = ["Abs", "ReduceMax", "Mul", "Max"]


def constants(k: int) -> dict[str, np.ndarray]:
    columns = RNG.uniform(0.01, 2, 80)
    weight = (RNG.standard_normal((k, 80)) + 0.7) * columns  # columns that are no more symmetric than trained ones
    return {"w": weight.astype(np.float32), "b": RNG.standard_normal(80).astype(np.float32)}


def activations(*shape: int) -> np.ndarray:
    """Tokens and channels of very different sizes, and a group of zeros."""
    x = (
        RNG.standard_normal(shape)
        * np.exp(RNG.standard_normal((*shape[:-1], 1)))
        * np.exp(RNG.standard_normal(shape[-1]))
    )
    x[..., 0, :32] = 0
    return x.astype(np.float32)


def options(group: int, **more: object) -> QuantizeStatic:
    return QuantizeStatic({}, products="grouped", group=group, smallest=0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "group"), [(96, 96), (96, 32), (96, 48), (64, 16), (33, 33)])
def test_it_is_what_numpy_says(k: int, group: int) -> None:
    given, x = constants(k), activations(2, 9, k)
    model = parse(declared(TEXT.format(k=k), given), given)
    log = apply(model, options(group))
    assert applied(log, "groups") == 1
    assert ops(model) == [*(["Reshape"] if group < k else []), *SCALES, *CODES]
    blocks = x.reshape(2, 9, k // group, group)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) * np.float32(1 / 127), 1e-30)
    rounded = (np.rint(blocks / scale) * scale.astype(np.float64)).reshape(x.shape)
    codes, scales, zeros = asymmetric_codes(given["w"], group)
    assert scales.shape == zeros.shape == (k // group, 80)
    steps, middles = (np.repeat(each.astype(np.float64), group, axis=0) for each in (scales, zeros))
    weight = (codes - middles) * steps
    assert np.abs(weight - given["w"]).max(axis=0).max() <= 0.51 * scales.max()
    np.testing.assert_allclose(run(model, {"x": x})[0], rounded @ weight + given["b"], rtol=1e-4, atol=1e-4)
    assert not options(group).run(clone(model), PassContext())  # once is enough


def test_finer_groups_are_closer_where_channels_differ() -> None:
    given, x = constants(128), RNG.standard_normal((2, 9, 128)).astype(np.float32)
    x[..., 40] *= 60  # takes the resolution of all channels in its group
    given["w"][40] /= 60  # and does not drown them in the product
    errors = []
    for group in (128, 64, 32, 16):
        model = parse(declared(TEXT.format(k=128), given), given)
        expected = run(model, {"x": x})[0]
        apply(model, options(group))
        errors.append(float(np.linalg.norm(run(model, {"x": x})[0] - expected) / np.linalg.norm(expected)))
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1] > 0, errors


def test_weights_have_a_scale_for_the_same_channels() -> None:
    """A block of rows with small weights keeps its resolution."""
    given, x = constants(64), RNG.standard_normal((2, 9, 64)).astype(np.float32)
    given["w"][32:] /= 50
    x[..., 32:] *= 50
    errors = []
    for group in (64, 32):
        model = parse(declared(TEXT.format(k=64), given), given)
        expected = run(model, {"x": x})[0]
        apply(model, options(group))
        errors.append(float(np.linalg.norm(run(model, {"x": x})[0] - expected)))
    assert errors[1] < errors[0] / 5


def test_readers_share_the_codes_of_what_they_read_and_keep_their_names() -> None:
    given = {"w": constants(64)["w"], "v": constants(64)["w"]}
    text = "g (float[9,64] x) => (float[9,80] y, float[9,80] z) { y = MatMul(x, w) z = MatMul(x, v) }"
    model = parse(declared(text, given), given)
    for node, name in zip(model.graph, ("one", "two"), strict=True):
        node.name = name
    apply(model, options(32))
    assert ops(model).count("QuantizeLinear") == 1 and ops(model).count("MatMul") == 2
    origins = [node.metadata_props["xform.origin"] for node in model.graph if node.op_type == "MatMul"]
    assert sorted(origins) == ["one", "two"]
    kept = parse(declared(text, given), given)
    kept.graph[0].name = "one"
    log = apply(kept, options(32, keep=("one",)))
    assert "too much accuracy" in missed(log)[0] and applied(log, "groups") == 1


def test_what_stays_in_float_is_told() -> None:
    given = constants(72)
    model = parse(declared(TEXT.format(k=72), given), given)
    assert "72 input channels are no multiple of groups of 32" in missed(apply(model, options(32)))[0]
    few = "g (float[2,72] x) => (float[2,80] y) { m = MatMul(x, w) y = Add(m, b) }"
    model = parse(declared(few, given), given)
    assert "5760 weights are too few to pay" in missed(apply(model, options(36)))[0]
    model = parse(declared(TEXT.format(k=72), given), given)
    small = QuantizeStatic({}, products="grouped", group=36)
    assert f"{18 * 72 * 80} multiply-adds are too few to pay" in missed(apply(model, small))[0]
    given["w"][3, 3] = np.nan
    model = parse(declared(TEXT.format(k=72), given), given)
    assert "not finite" in missed(apply(model, options(36)))[0]


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="group must be"):
        QuantizeStatic({}, group=0).rules()
    with pytest.raises(UsageError, match="products must be one of"):
        QuantizeStatic({}, products="all").rules()  # type: ignore[arg-type]


def test_groups_are_chosen_from_the_channels_of_all_products() -> None:
    def group(*sizes: int) -> int:
        given = {f"w{i}": np.ones((k, 1 + (1 << 16) // k), np.float32) for i, k in enumerate(sizes)}
        inputs = ", ".join(f"float[9,{k}] x{i}" for i, k in enumerate(sizes))
        outputs = ", ".join(f"float[9,{w.shape[1]}] y{i}" for i, w in enumerate(given.values()))
        nodes = " ".join(f"y{i} = MatMul(x{i}, w{i})" for i in range(len(sizes)))
        return widest_group(parse(declared(f"g ({inputs}) => ({outputs}) {{ {nodes} }}", given), given))

    assert group(384, 1536) == 384 and group(768, 2048) == 256 and group(96, 192, 384) == 96
    assert group(384, 1536, 50) == 384  # what would make it smaller than 32 is left out
    assert group(50) == 0
    assert finer_groups(768) == [128, 64, 32] and finer_groups(192) == [96, 64, 32] and finer_groups(32) == []


def test_only_what_was_made_is_recognized() -> None:
    given = constants(64)
    for changed in ("", "factor", "axis", "other", "dtype"):
        model = parse(declared(TEXT.format(k=64), given), given)
        apply(model, options(32))
        nodes = {node.op_type: node for node in model.graph}
        if changed == "factor":
            other = ir.Value(
                name="f", const_value=ir.tensor(np.float32(1 / 126)), type=ir.TensorType(ir.DataType.FLOAT)
            )
            other.shape = ir.Shape(())
            model.graph.register_initializer(other)
            nodes["Mul"].replace_input_with(1, other)
        elif changed == "axis":
            nodes["QuantizeLinear"].attributes["axis"] = ir.AttrInt64("axis", 1)
        elif changed == "dtype":
            nodes["QuantizeLinear"].attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(ir.DataType.INT4))
        elif changed == "other":
            nodes["Abs"].replace_input_with(0, model.graph.inputs[0])
        found = group_of(nodes["MatMul"].inputs[0])
        assert (found == (model.graph.inputs[0], 32)) == (changed == "")


@pytest.mark.parametrize("block", [96, 32])
def test_compensated_codes_are_closer_in_what_the_product_gives(block: int) -> None:
    weight = constants(96)["w"]
    x = activations(50, 9, 96).reshape(-1, 96).astype(np.float64) @ RNG.standard_normal((96, 96))
    exact = x @ weight
    errors = []
    compensated = compensated_asymmetric_codes(weight, x.T @ x / len(x), block)
    for codes, scale, zero in (asymmetric_codes(weight, block), compensated):
        assert codes.dtype == zero.dtype == np.uint8 and scale.dtype == np.float32
        middle, step = (np.repeat(each.astype(np.float64), block, axis=0) for each in (zero, scale))
        errors.append(np.linalg.norm(x @ ((codes - middle) * step) - exact))
    assert errors[1] < 0.9 * errors[0]
