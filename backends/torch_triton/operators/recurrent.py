"""RNN, GRU and LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xform.backends.torch_triton.functions import recurrent
from xform.backends.torch_triton.lower.site import Site, Unsupported
from xform.backends.torch_triton.lower.table import lowers

_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


@lowers("RNN", "GRU", "LSTM")
def recur(site: Site) -> Any:
    kind = site.node.op_type
    direction = site.attr("direction", "forward")
    count = 2 if direction == "bidirectional" else 1
    names = [name.lower() for name in site.attr("activations", None) or _DEFAULTS[kind] * count]
    unknown = sorted(set(names) - set(recurrent.ACTIVATIONS))
    if unknown:
        raise Unsupported(f"activation {', '.join(unknown)}")
    parameters = _parameters(names, site.attr("activation_alpha"), site.attr("activation_beta"))
    options: dict[str, Any] = {
        "direction": direction,
        "activations": list(zip(names, *parameters, strict=True)),
        "clip": site.attr("clip", 0.0),
        "batch_first": bool(site.attr("layout", 0)),
    }
    if kind == "GRU":
        options["linear_before_reset"] = bool(site.attr("linear_before_reset", 0))
    if kind == "LSTM":
        if site.attr("input_forget", 0):
            raise Unsupported("coupled input and forget gates")
        options |= {"initial_cell": site.optional(6), "peepholes": site.optional(7)}
    functions: dict[str, Callable[..., Any]] = {"RNN": recurrent.rnn, "GRU": recurrent.gru, "LSTM": recurrent.lstm}
    x, w, r = (site.tensor(i) for i in range(3))
    result = site.call(functions[kind], x, w, r, site.optional(3), site.optional(4), site.optional(5), **options)
    return site.pick(result, len(site.node.outputs))


def _parameters(names: list[str], alphas: Any, betas: Any) -> tuple[list[float], list[float]]:
    """alpha and beta of each activation: given ones go, in order, to the activations that take one."""
    given = [iter(alphas or ()), iter(betas or ())]
    result: tuple[list[float], list[float]] = ([], [])
    for name in names:
        defaults = recurrent.DEFAULTS.get(name, (None, None))
        for column, default, source in zip(result, defaults, given, strict=True):
            column.append(0.0 if default is None else next(source, default))
    return result
