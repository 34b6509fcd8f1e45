from __future__ import annotations

import networkx as nx
import numpy as np
from support import declared, floats, parse

from xform.graph.channel_axis import operands, results
from xform.graph.stream_view import describe, draw, stream_graph
from xform.graph.streams import find_streams

PRE_NORM = """
    g (int64[2,5] ids) => (float[2,5,9] y) {
        e = Gather(table, ids)
        p = Add(e, pos)
        n0 = LayerNormalization<axis=-1>(p, g0)
        m0 = MatMul(n0, w0)
        l0 = Add(m0, b0)
        s0 = Mul(l0, gamma)
        x1 = Add(p, s0)
        n1 = LayerNormalization<axis=-1>(x1, g1)
        y = MatMul(n1, head)
    }"""
CONSTANTS = {
    "table": floats(11, 8), "pos": floats(1, 5, 8), "w0": floats(8, 8), "b0": floats(8), "gamma": floats(8),
    "g0": floats(8), "g1": floats(8), "head": floats(8, 9),
}  # fmt: skip


def _streams(text: str, constants: dict[str, np.ndarray]):
    used = {name: array for name, array in constants.items() if name in text}
    return find_streams(parse(declared(text, used), used).graph)


def _kinds(stream) -> list[tuple[str, str]]:
    return sorted((writer.kind, str(writer.value.name)) for writer in stream.writers)


def test_one_stream_with_its_writers_and_readers() -> None:
    (stream,) = _streams(PRE_NORM, CONSTANTS)
    assert stream.channels == 8
    assert stream.additions() == 2
    assert _kinds(stream) == [("constant", "pos"), ("constant", "table"), ("linear", "s0")]
    assert [r.kind for r in stream.readers] == ["layer_norm", "layer_norm"]
    assert {v.name for v in stream.axes} == {"table", "pos", "e", "p", "s0", "x1"}


def test_layer_scale_belongs_to_the_linear_writer() -> None:
    (stream,) = _streams(PRE_NORM, CONSTANTS)
    writer = next(w for w in stream.writers if w.kind == "linear")
    assert [n.op_type for n in writer.nodes] == ["Mul", "Add", "MatMul"]


def test_a_linear_map_that_something_else_reads_is_shared() -> None:
    text = PRE_NORM.replace("x1 = Add(p, s0)", "x1 = Add(p, m0)\n r = Relu(m0)").replace(
        "=> (float[2,5,9] y)", "=> (float[2,5,9] y, float[2,5,8] r)"
    )
    (stream,) = _streams(text, CONSTANTS)
    assert [(w.value.name, w.shared) for w in stream.writers if w.kind == "linear"] == [("m0", True)]


def test_every_other_reader_is_named_with_its_reason() -> None:
    text = PRE_NORM.replace("y = MatMul(n1, head)", "y = MatMul(n1, head)\n z = MatMul(x1, head)").replace(
        "=> (float[2,5,9] y)", "=> (float[2,5,9] y, float[2,5,9] z)"
    )
    (stream,) = _streams(text, CONSTANTS)
    others = [r for r in stream.readers if r.kind == "other"]
    assert [(r.value.name, r.reason) for r in others] == [("x1", "MatMul does not treat all channels alike")]


def test_a_graph_output_is_a_reader() -> None:
    text = PRE_NORM.replace("=> (float[2,5,9] y)", "=> (float[2,5,9] y, float[2,5,8] x1)")
    (stream,) = _streams(text, CONSTANTS)
    assert [(r.name, r.node) for r in stream.readers if r.kind == "other"] == [("output x1", None)]


def test_a_reader_behind_a_mean_over_tokens_is_found() -> None:
    text = PRE_NORM.replace(
        "y = MatMul(n1, head)", "y = MatMul(n1, head)\n q = ReduceMean<keepdims=0>(x1, ax)\n z = MatMul(q, head)"
    ).replace("=> (float[2,5,9] y)", "=> (float[2,5,9] y, float[2,9] z)")
    (stream,) = _streams(text, {**CONSTANTS, "ax": np.array([1])})
    assert [r.node.op_type for r in stream.readers if r.kind == "other" and r.node] == ["MatMul"]


def test_a_constant_of_two_streams_ties_them_not_together() -> None:
    text = """
        g (int64[5] a, int64[5] b) => (float[5,8] y, float[5,8] z) {
            x = Gather(table, a)
            y = LayerNormalization<axis=-1>(x, g0)
            u = Gather(table, b)
            z = LayerNormalization<axis=-1>(u, g1)
        }"""
    streams = _streams(text, CONSTANTS)
    assert [len(s.norms()) for s in streams] == [1, 1]


def test_a_norm_of_a_norm_is_a_stream_of_its_own() -> None:
    text = """
        g (float[5,8] x) => (float[5,8] z) {
            y = LayerNormalization<axis=-1>(x, g0)
            z = RMSNormalization<axis=-1>(y, g1)
        }"""
    first, second = _streams(text, CONSTANTS)
    assert [w.reason for w in first.writers] == ["is an input of the graph"]
    assert second.norms("rms_norm") and not second.norms()
    assert "another normalization" in second.writers[0].reason


def test_norms_over_two_axes_read_no_stream() -> None:
    text = "g (float[5,4,8] x) => (float[5,4,8] y) { y = LayerNormalization<axis=1>(x, s) }"
    assert _streams(text, {"s": floats(4, 8)}) == []


def test_class_token_views_and_channel_first_convolutions() -> None:
    text = """
        g (float[2,3,8,8] x) => (float[2,8] y) {
            c = Conv<strides=[4,4]>(x, w, b)
            r = Reshape(c, flat)
            t = Transpose<perm=[0,2,1]>(r)
            k = Expand(cls, many)
            j = Concat<axis=1>(k, t)
            n = LayerNormalization<axis=-1>(j, g0)
            y = Gather<axis=1>(n, zero)
        }"""
    constants = {
        "w": floats(8, 3, 4, 4), "b": floats(8), "flat": np.array([2, 8, 4]), "cls": floats(1, 1, 8),
        "many": np.array([2, 1, 8]), "g0": floats(8), "zero": np.array(0),
    }  # fmt: skip
    (stream,) = _streams(text, constants)
    assert _kinds(stream) == [("constant", "cls"), ("linear", "t")]
    assert [n.op_type for n in stream.joins] == ["Expand", "Concat"]


def test_patch_merging_joins_channels_and_so_sees_the_means() -> None:
    text = """
        g (int64[6] ids) => (float[3,16] z, float[6,8] y) {
            x = Gather(table, ids)
            y = LayerNormalization<axis=-1>(x, g0)
            m = Reshape(x, pairs)
            z = LayerNormalization<axis=-1>(m, g2)
        }"""
    streams = _streams(text, {**CONSTANTS, "pairs": np.array([3, 16]), "g2": floats(16)})
    assert [r.reason for r in streams[0].readers if r.kind == "other"] == [
        "Reshape does not keep the channels as one axis"
    ]
    assert [w.kind for w in streams[1].writers] == ["other"]


def test_grouped_convolutions_are_no_linear_writers() -> None:
    text = """
        g (float[2,8,4,4] x) => (float[2,4,4,8] y) {
            c = Conv<group=8>(x, w)
            t = Transpose<perm=[0,2,3,1]>(c)
            y = LayerNormalization<axis=-1>(t, g0)
        }"""
    (stream,) = _streams(text, {"w": floats(8, 1, 1, 1), "g0": floats(8)})
    assert [(w.kind, "groups" in w.reason) for w in stream.writers] == [("other", True)]


def _node(text: str, op_type: str, constants: dict[str, np.ndarray] | None = None):
    model = parse(declared(text, constants or {}), constants)
    return next(n for n in model.graph if n.op_type == op_type)


def test_factors_per_position_keep_channels_alike_and_factors_per_channel_do_not() -> None:
    per_position = _node("g (float[2,5,8] x, float[2,5,1] m) => (float[2,5,8] y) { y = Mul(x, m) }", "Mul")
    assert operands(per_position, 2) == {0: 2}
    per_channel = _node("g (float[2,5,8] x, float[8] m) => (float[2,5,8] y) { y = Mul(x, m) }", "Mul")
    assert "another factor" in operands(per_channel, 2)


def test_numbers_added_to_all_channels_are_refused() -> None:
    node = _node("g (float[2,8] x, float[2,1] m) => (float[2,8] y) { y = Add(x, m) }", "Add")
    assert "one number to all channels" in operands(node, 1)


def test_padding_with_zeros_is_fine_and_with_ones_is_not() -> None:
    text = "g (float[2,8] x) => (float[3,8] y) { y = Pad(x, pads, value) }"
    pads = np.array([0, 0, 1, 0])
    zero = _node(text, "Pad", {"pads": pads, "value": np.array(0, np.float32)})
    one = _node(text, "Pad", {"pads": pads, "value": np.array(1, np.float32)})
    assert operands(zero, 1) == {0: 1}
    assert "one number into all channels" in operands(one, 1)


def test_gather_and_slice_along_channels_are_refused() -> None:
    gather = _node("g (float[2,8] x) => (float[2,8] y) { y = Gather<axis=1>(x, i) }", "Gather", {"i": np.arange(8)})
    assert operands(gather, 1) == "Gather picks channels"
    text = "g (float[2,8] x) => (float[2,8] y) { y = Slice(x, s, e, a) }"
    ints = {"s": np.array([0]), "e": np.array([8]), "a": np.array([1])}
    assert operands(_node(text, "Slice", ints), 1) == "Slice picks channels"


def test_gather_nd_picks_positions() -> None:
    text = "g (float[2,5,8] x) => (float[3,8] y) { y = GatherND(x, i) }"
    node = _node(text, "GatherND", {"i": np.array([[0, 1], [1, 4], [1, 0]])})
    assert operands(node, 1) == {0: 2}
    assert operands(node, 0) == "GatherND picks channels"
    text = "g (float[2,5,8] x) => (float[2,8] y) { y = GatherND<batch_dims=1>(x, i) }"
    assert operands(_node(text, "GatherND", {"i": np.array([[1], [4]])}), 1) == {0: 2}


def test_results_follow_the_channels_forward() -> None:
    node = _node("g (float[2,5,8] x) => (float[2,8,5] y) { y = Transpose<perm=[0,2,1]>(x) }", "Transpose")
    assert results(node, 0, 2) == {0: 1}
    split = _node("g (float[4,8] x) => (float[2,8] y, float[2,8] z) { y, z = Split<num_outputs=2>(x) }", "Split")
    assert results(split, 0, 1) == {0: 1, 1: 1}
    assert isinstance(results(split, 0, 0), str)


def test_views_as_graph_text_and_data() -> None:
    streams = _streams(PRE_NORM, CONSTANTS)
    graph = stream_graph(streams)
    assert nx.is_directed_acyclic_graph(graph)
    kinds = [data["kind"] for _, data in graph.nodes(data=True)]
    assert (kinds.count("writer"), kinds.count("join"), kinds.count("reader")) == (3, 3, 2)
    lines = draw(streams).splitlines()
    assert lines[0] == "stream 1: 8 channels, 2 sums, read by 2 layer_norm"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["+", "constant"], ["+", "constant"], [">", "layer_norm"], ["+", "linear"], [">", "layer_norm"],
    ]  # fmt: skip
    assert [w["kind"] for w in describe(streams)[0]["writers"]] == ["linear", "constant", "constant"]
    assert draw([]) == "no residual stream\n"
