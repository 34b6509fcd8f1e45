"""Recurrent layers, step by step, as ONNX defines them.

Shapes: x [T, B, I]; w [D, G H, I]; r [D, G H, H]; b [D, 2 G H]; states [D, B, H], with D directions and G gates.
Results: all steps [T, D, B, H], the last state [D, B, H] (and cell). `batch_first` moves B to the front of all of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Activation = tuple[str, float, float]
Step = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]

DEFAULTS: dict[str, tuple[float | None, float | None]] = {
    "affine": (1.0, 0.0), "elu": (1.0, None), "hardsigmoid": (0.2, 0.5), "leakyrelu": (0.01, None),
    "scaledtanh": (1.0, 1.0), "thresholdedrelu": (1.0, None),
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "affine": lambda x, a, b: a * x + b,
    "elu": lambda x, a, b: F.elu(x, a),
    "hardsigmoid": lambda x, a, b: (a * x + b).clamp(0, 1),
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, a),
    "relu": lambda x, a, b: torch.relu(x),
    "scaledtanh": lambda x, a, b: a * torch.tanh(b * x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "softplus": lambda x, a, b: torch.logaddexp(x, torch.zeros_like(x)),
    "softsign": lambda x, a, b: F.softsign(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "thresholdedrelu": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
}


def _function(activation: Activation, clip: float) -> Callable[[torch.Tensor], torch.Tensor]:
    name, alpha, beta = activation
    apply = ACTIVATIONS[name]
    return lambda x: apply(x.clamp(-clip, clip) if clip else x, alpha, beta)


def _run(x: torch.Tensor, state: tuple[torch.Tensor, ...], lengths: torch.Tensor | None, step: Step, backward: bool):  # type: ignore[no-untyped-def]
    """All steps of one direction. Beyond its length a sequence keeps its state and gives 0."""
    total = x.shape[0]
    outputs: list[torch.Tensor] = []
    for t in reversed(range(total)) if backward else range(total):
        stepped = step(x[t], state)
        if lengths is None:
            state = stepped
            outputs.append(state[0])
            continue
        live = (t < lengths).reshape(-1, 1)
        state = tuple(torch.where(live, new, old) for new, old in zip(stepped, state, strict=True))
        outputs.append(torch.where(live, state[0], torch.zeros_like(state[0])))
    if not outputs:  # a sequence of no steps
        return x.new_empty((0, *state[0].shape)), state
    return torch.stack(outputs[::-1] if backward else outputs), state


def _directions(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    states: Sequence[torch.Tensor | None],
    hidden: int,
    lengths: torch.Tensor | None,
    direction: str,
    batch_first: bool,
    step_of: Callable[[int], Step],
) -> tuple[torch.Tensor, ...]:
    """Steps get x w^T + b, which is one product for all of them."""
    x = x.transpose(0, 1) if batch_first else x
    count = 2 if direction == "bidirectional" else 1
    zero = x.new_zeros((count, x.shape[1], hidden))
    begun = [zero if s is None else s.transpose(0, 1) if batch_first else s for s in states]
    outputs, finals = [], []
    for d in range(count):
        backward = direction == "reverse" or d == 1
        projected = F.linear(x, w[d], None if b is None else b[d, : w.shape[1]])
        result, final = _run(projected, tuple(s[d] for s in begun), lengths, step_of(d), backward)
        outputs.append(result)
        finals.append(final)
    every = torch.stack(outputs, 1)  # [T, D, B, H]
    last = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    if batch_first:
        return every.permute(2, 0, 1, 3), *(part.transpose(0, 1) for part in last)
    return every, *last


def _bias(b: torch.Tensor | None, d: int) -> torch.Tensor | None:
    """The bias of the product with the state."""
    return None if b is None else b[d].chunk(2)[1]


def rnn(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    lengths: torch.Tensor | None,
    initial: torch.Tensor | None,
    *,
    direction: str,
    activations: Sequence[Activation],
    clip: float,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """h' = f(x w^T + h r^T + b)."""

    def step_of(d: int) -> Step:
        rb = _bias(b, d)
        f = _function(activations[d], clip)
        return lambda xt, state: (f(xt + F.linear(state[0], r[d], rb)),)

    return _directions(x, w, b, [initial], r.shape[-1], lengths, direction, batch_first, step_of)


def gru(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    lengths: torch.Tensor | None,
    initial: torch.Tensor | None,
    *,
    direction: str,
    activations: Sequence[Activation],
    clip: float,
    batch_first: bool,
    linear_before_reset: bool,
) -> tuple[torch.Tensor, ...]:
    """Gates z (update), r (reset), n in this order: h' = (1 - z) n + z h.

    The reset gate multiplies h before its product with the weights, or (`linear_before_reset`) the product itself.
    """
    hidden = r.shape[-1]

    def step_of(d: int) -> Step:
        rb = _bias(b, d)
        f, g = (_function(a, clip) for a in activations[2 * d : 2 * d + 2])
        candidate = r[d, 2 * hidden :]
        candidate_bias = None if rb is None else rb[2 * hidden :]

        def step(xt: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            h = state[0]
            xz, xr, xn = xt.split(hidden, -1)
            hz, hr = F.linear(h, r[d, : 2 * hidden], None if rb is None else rb[: 2 * hidden]).split(hidden, -1)
            z, reset = f(xz + hz), f(xr + hr)
            if linear_before_reset:
                n = g(xn + reset * F.linear(h, candidate, candidate_bias))
            else:
                n = g(xn + F.linear(reset * h, candidate, candidate_bias))
            return ((1 - z) * n + z * h,)

        return step

    return _directions(x, w, b, [initial], hidden, lengths, direction, batch_first, step_of)


def lstm(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    lengths: torch.Tensor | None,
    initial: torch.Tensor | None,
    *,
    direction: str,
    activations: Sequence[Activation],
    clip: float,
    batch_first: bool,
    initial_cell: torch.Tensor | None = None,
    peepholes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gates i, o, f, c in this order: cell' = f cell + i c, h' = o act(cell'); peepholes [D, 3 H] for i, o, f."""
    hidden = r.shape[-1]

    def step_of(d: int) -> Step:
        rb = _bias(b, d)
        f, g, last = (_function(a, clip) for a in activations[3 * d : 3 * d + 3])
        pi, po, pf = (None,) * 3 if peepholes is None else peepholes[d].split(hidden, -1)

        def step(xt: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            h, cell = state
            i, o, forget, c = (xt + F.linear(h, r[d], rb)).split(hidden, -1)
            if pi is not None and pf is not None:
                i, forget = i + pi * cell, forget + pf * cell
            cell = f(forget) * cell + f(i) * g(c)
            o = o if po is None else o + po * cell
            return f(o) * last(cell), cell

        return step

    return _directions(x, w, b, [initial, initial_cell], hidden, lengths, direction, batch_first, step_of)
