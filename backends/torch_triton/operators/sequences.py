"""Sequences (Python lists) and optionals (None if empty)."""

from __future__ import annotations

import operator
from typing import Any

import torch

from xform.backends.torch_triton.functions import control
from xform.backends.torch_triton.lower.site import Ints, Site
from xform.backends.torch_triton.lower.table import lowers


@lowers("SequenceEmpty")
def sequence_empty(site: Site) -> Any:
    return site.call(list)


@lowers("SequenceConstruct")
def sequence_construct(site: Site) -> Any:
    return site.call(list, site.tensors())


@lowers("SequenceAt")
def sequence_at(site: Site) -> Any:
    return site.call(operator.getitem, site.tensor(), site.demand_ints(1).items[0])


@lowers("SequenceLength")
def sequence_length(site: Site) -> Any:
    return Ints((site.call(len, site.tensor()),), is_scalar=True)


@lowers("SequenceInsert")
def sequence_insert(site: Site) -> Any:
    place = site.demand_ints(2).items[0] if site.has(2) else None
    return site.call(control.insert, site.tensor(0), site.tensor(1), place)


@lowers("SequenceErase")
def sequence_erase(site: Site) -> Any:
    return site.call(control.erase, site.tensor(0), site.demand_ints(1).items[0] if site.has(1) else -1)


@lowers("ConcatFromSequence")
def concat_from_sequence(site: Site) -> Any:
    return site.call(control.concat_sequence, site.tensor(), site.attr("axis"), bool(site.attr("new_axis", 0)))


@lowers("SplitToSequence")
def split_to_sequence(site: Site) -> Any:
    split: Any = None
    if site.has(1):
        shape = site.shape(1)
        if site.has_ints(1) or shape == ():
            split = site.demand_ints(1)
        else:
            split = site.call(torch.Tensor.tolist, site.tensor(1))
    return site.call(
        control.split_to_sequence, site.tensor(), split, site.attr("axis", 0), bool(site.attr("keepdims", 1))
    )


@lowers("Optional")
def optional(site: Site) -> Any:
    return site.tensor() if site.has(0) else site.call(control.given_or, None, None)


@lowers("OptionalHasElement")
def optional_has_element(site: Site) -> Any:
    return site.call(control.has_element, site.optional(0))


@lowers("OptionalGetElement")
def optional_get_element(site: Site) -> Any:
    return site.tensor()
