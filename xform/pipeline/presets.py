"""Presets: flat lists of pass names, in the order in which the passes run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from xform.errors import UsageError
from xform.passes import PASSES
from xform.rewrite.passes import Pass

EXACT: tuple[str, ...] = (
    # what every later pass may rely on: shapes, no identities, constants that are constants
    "infer_shapes",
    "propagate_constants",
    "deduplicate_initializers",
    "eliminate_common_subexpressions",  # exporters compute the mean of a LayerNorm twice; patterns want it once
    "remove_dead_code",
    # every spelling to the semantic operator, from the small ones to attention, which is spelled with them
    "raise_linear",
    "raise_layer_norm",
    "raise_rms_norm",
    "widen_norm_statistics",
    "raise_gelu",
    "raise_activation",
    "raise_softmax",
    "raise_rotary",
    "raise_attention",
    "eliminate_unread_rows",  # of the last block, by the meaning of its operators
    # algebra on weights
    "raise_block_linear",
    "merge_affine_maps",
    # operators in the shapes that run fast
    "split_channel_multiplier",
    "absorb_channel_shuffle",
    "absorb_transposes",
    "pack_products",
    # what the above left behind
    "simplify_layout",
    "raise_attention",  # heads repeated for groups, which views around a transpose had hidden
    "fold_shape_arithmetic",
    "eliminate_no_ops",
    "deduplicate_initializers",
    "eliminate_common_subexpressions",
    "remove_dead_code",
    "infer_shapes",
    "settle",  # all of them again, until nothing changes
)

INT8: tuple[str, ...] = (
    *EXACT,
    "quantize_products",  # which ones, a search on calibration data decides
    "eliminate_common_subexpressions",  # products of one input share its quantized form
    "remove_dead_code",
    "infer_shapes",
)

PRESETS: Mapping[str, tuple[str, ...]] = {"exact": EXACT, "int8": INT8}


def resolve(
    preset: str = "exact",
    passes: Sequence[str | Pass] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Pass]:
    """The passes to run.

    Args:
        preset: Name of a preset; ignored where `passes` is given.
        passes: Pass names or pass objects, in order, in place of the preset's.
        options: Field values per pass name, for passes given by name.

    Raises:
        UsageError: An unknown preset, pass or option, with the closest known name.
    """
    if passes is None:
        if preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}", hint=_suggest(preset, list(PRESETS)))
        passes = PRESETS[preset]
    options = options or {}
    named = [p if isinstance(p, str) else p.name for p in passes]
    for name in options:
        if name not in named:
            raise UsageError(f"options were given for pass {name!r}, which does not run", hint=_suggest(name, named))
    return [p if isinstance(p, Pass) else make_pass(p, options.get(p, {})) for p in passes]


def make_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name with options.

    Raises:
        UsageError: An unknown pass or option.
    """
    if name not in PASSES:
        raise UsageError(f"unknown pass {name!r}", hint=_suggest(name, list(PASSES)))
    kind = PASSES[name]
    known = [f.name for f in fields(kind)]
    for option in options or {}:
        if option not in known:
            raise UsageError(f"pass {name!r} has no option {option!r}", hint=_suggest(option, known))
    return kind(**(options or {}))


def _suggest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
