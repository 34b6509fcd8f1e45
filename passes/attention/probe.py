"""What values that depend on the padding mask alone are, by computing them for masks of every kind.

Exporters spell masks in many ways, and what counts is whether a mask closes the keys of pads. So it is looked at: the
operators between the padding mask and a value run on full, left- and right-padded, sparse and empty rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from xform.graph.values import Array, Dim, attribute, constant_tensor, is_op, shape_of
from xform.passes.attention.padding import Padding

CLOSED = -1e4  # a mask as low leaves a key no weight, as logits stay far above it
_BATCH, _TOKENS = 5, 7  # where they are not fixed
_KINDS = 4  # of masks: right-padded, left-padded, full, empty
_MOST_NODES = 256
_MOST_ELEMENTS = 1 << 24


class Probe:
    """Values under one set of padding masks.

    Args:
        first: The kind of mask that the first row has; a fixed batch may be too small for all kinds (`probes`).

    Attributes:
        tokens: [B, S], true where a token is.
    """

    def __init__(self, padding: Padding, first: int = 0) -> None:
        self._padding = padding
        chosen = zip(padding.dims, (_BATCH, _TOKENS), strict=True)
        self._sizes: dict[Dim, int] = {d: size for d, size in chosen if isinstance(d, str)}
        batch, length = (d if isinstance(d, int) else self._sizes.get(d, 1) for d in padding.dims)
        rng = np.random.default_rng(0)
        tokens = rng.random((batch, length)) < 0.5
        kinds = [np.arange(length) < (length + 1) // 2, np.arange(length) >= length // 2, np.ones(length, bool)]
        for row, kind in enumerate([*kinds, np.zeros(length, bool)][first:]):
            if row < batch:
                tokens[row] = kind
        self.tokens = tokens
        self._known: dict[ir.Value, Array | None] = {}

    def of(self, value: ir.Value) -> Array | None:
        """What the value is; None where it depends on more than the mask, or cannot be computed."""
        if value not in self._known:
            self._known[value] = self._run(value)
        return self._known[value]

    def _run(self, value: ir.Value) -> Array | None:
        graph = onnx.GraphProto(name="probe")
        feeds: dict[str, Array] = {}
        nodes = self._sources(value, graph, feeds)
        if nodes is None or value.name is None or value.dtype is None:
            return None
        graph.node.extend(ir.to_proto(node) for node in nodes)
        graph.output.append(onnx.ValueInfoProto(name=value.name))
        version = self._padding.opset
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=10)
        try:
            with np.errstate(all="ignore"):
                outputs: Any = ReferenceEvaluator(model).run(None, feeds)
                return np.asarray(outputs[0])
        except Exception:  # the evaluator lacks an operator or a type; then nothing is known about the value
            return None

    def _sources(self, value: ir.Value, graph: onnx.GraphProto, feeds: dict[str, Array]) -> list[ir.Node] | None:
        """The operators that make the value, in order; what they start from goes into `graph` and `feeds`."""
        order: dict[ir.Node, None] = {}
        stack: list[tuple[ir.Value, bool]] = [(value, False)]
        seen: set[ir.Value] = set()
        while stack:
            at, done = stack.pop()
            node = at.producer()
            if done and node is not None:
                order[node] = None
                continue
            if at in seen:
                continue
            seen.add(at)
            if len(seen) > _MOST_NODES:
                return None
            tensor = constant_tensor(at)
            given = self._given(at)
            if given is not None and at.name is not None:
                feeds[at.name] = given
                graph.input.append(onnx.helper.make_tensor_value_info(at.name, int(at.dtype or 0), given.shape))
            elif tensor is not None and tensor.size <= _MOST_ELEMENTS:
                graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), at.name))
            elif node is None or any(a.type in (ir.AttributeType.GRAPH,) for a in node.attributes.values()):
                return None
            else:
                stack.append((at, True))
                stack += [(v, False) for v in node.inputs if v is not None]
        return list(order)

    def _given(self, value: ir.Value) -> Array | None:
        """The mask itself, and shapes of anything."""
        if value is self._padding.mask:
            return self.tokens.astype(value.dtype.numpy()) if value.dtype is not None else None
        node = value.producer()
        if node is None or not is_op(node, "Shape"):
            return None
        shape: tuple[Dim, ...] | None = shape_of(node.inputs[0])
        if shape is None:
            return None
        start, end = attribute(node, "start", 0), attribute(node, "end", len(shape))
        kept = [d if isinstance(d, int) else self._sizes.get(d) for d in shape[start:end]]
        return None if None in kept else np.array(kept, np.int64)


def probes(padding: Padding) -> list[Probe]:
    """Probes that show masks of all kinds, however few sequences a fixed batch holds."""
    batch = padding.dims[0]
    step = min(batch, _KINDS) if isinstance(batch, int) and batch else _KINDS
    return [Probe(padding, first) for first in range(0, _KINDS, step)]


def closes_pads(mask: ir.Value, probe: Probe, computed: Array, *, for_all: bool) -> bool:
    """Whether a mask of an attention leaves the keys of pads no weight.

    Args:
        computed: [B, S], true for the positions that are computed: keys elsewhere are pads.
        for_all: For every query; else for those that are computed.
    """
    found = probe.of(mask)
    if found is None or found.ndim != 4:
        return False
    batch, length = computed.shape
    queries = found.shape[2]
    if found.shape[0] not in (1, batch) or found.shape[3] not in (1, length):
        return False
    if not for_all and queries not in (1, length):
        return False
    shut = ~found if found.dtype.kind == "b" else np.isneginf(found)  # has no weight in any row
    closed = shut if found.dtype.kind == "b" else found <= CLOSED  # has none beside a key that is open
    of_keys = computed[:, None, None, :]
    has_open = (~closed & of_keys).any(axis=-1, keepdims=True)
    matters = ~of_keys if for_all else ~of_keys & computed[:, None, :, None]
    return not bool((matters & ~shut & ~(closed & has_open)).any())


def hides(condition: ir.Value, probe: Probe, computed: Array, axis: int | None) -> bool:
    """Whether a condition over values whose axis 1 is the tokens is false for every position that is not computed."""
    found = probe.of(condition)
    if found is None or axis != 1 or found.ndim < 2 or found.shape[1] != computed.shape[1]:
        return False
    batch, length = computed.shape
    flat = found.reshape(found.shape[0], length, math.prod(found.shape[2:]))
    return not bool((np.broadcast_to(flat, (batch, *flat.shape[1:])) & ~computed[:, :, None]).any())
