"""Fills of masked logits, `Where(condition, logits, fill)`, as numbers of an additive mask, and when that is exact.

The operator adds masks: a masked logit x becomes x + f, not f. Let f' be the number in the mask.

1. fill = -inf: f' = -inf, whatever comes after.
2. A *deep* fill (`xform.graph.masks`): f' = fill. x + fill rounds to fill, so every later step finds what it found.
3. Any other fill is exact only in what the softmax makes of it: the keys have no weight beside an open key, and equal
   weights in a row without one. That holds with a deep f' if
   - nothing is added after the fill, and only small numbers (a learned bias) before it;
   - all finite fills come to one number in the end;
   - that number is far below every logit: -1e9 is; less, where a soft cap bounds the logits.
   float16 has no deep numbers; there f' = -inf, and every row of the condition needs an open key.

Additive masks stay what they are. Sums of them are taken before the logits come in. A mask that is neither small nor
deep rounds differently then; so it has to be the only one, and later factors on it have to be powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import onnx_ir as ir

from xform.graph.masks import coarse_number, is_deep, is_small, is_switch, never_minus_infinity, opens_every_row
from xform.graph.values import constant
from xform.patterns.attention_logits import AddMask, Fill, Logits, Multiply, Step
from xform.rewrite.rule import Failure

FAR_BELOW = -0.999e9  # no logits of a network come near
_VANISHES = 800.0  # exp(-800) is 0 even in float64
_LEARNED = 1e6  # what a bias may add at most before a fill
_LOWEST_HALF = -6e4  # in float16 only the lowest numbers are below every logit


def deep_number(dtype: ir.DataType) -> float:
    """5/8 of the lowest number: far from what ONNX Runtime's kernel takes for -inf, and twice it is -inf.

    1.44 times it is finite, which kernels need that compute in powers of two.
    """
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype.numpy()).min) * 0.625


def settle(logits: Logits, dtype: ir.DataType) -> Logits | Failure:
    """The same chain with the numbers of an additive mask for its fills, or why there are none.

    Args:
        dtype: Type of the logits.
    """
    failure = _check_sums(logits, dtype)
    if failure is not None:
        return failure
    steps = logits.steps
    weak = [i for i, step in enumerate(steps) if isinstance(step, Fill) and not _is_exact(steps, i, dtype)]
    if not weak:
        return logits
    failure = _check_weak(logits, weak, dtype)
    if failure is not None:
        return failure
    fill = _number_for(steps, weak, dtype)
    if isinstance(fill, Failure):
        return fill
    settled = tuple(replace(s, fill=fill) if isinstance(s, Fill) and i in weak else s for i, s in enumerate(steps))
    return replace(logits, steps=settled)


def _number_for(steps: Sequence[Step], weak: Sequence[int], dtype: ir.DataType) -> float | Failure:
    """A number that stays deep and finite under all factors that come after the fills at `weak`."""
    if dtype is ir.DataType.FLOAT16:
        return -math.inf
    fill = deep_number(dtype)
    first = steps[weak[0]]
    assert isinstance(first, Fill)
    relative = [number / first.fill for number in _numbers(steps, weak[0])]
    fill /= max(relative)
    between = any(isinstance(s, Multiply) for s in steps[weak[0] : weak[-1]])
    if between or not is_deep(fill * min(relative), dtype):
        return Failure(f"logits filled with {first.fill:g} are scaled in a way that a mask cannot follow", ())
    return fill


def may_close_rows(logits: Logits) -> bool:
    """Whether a row may come out with all of its logits -inf, which a softmax makes NaN."""
    infinite: list[bool] = []  # of each step that can add -inf, whether it leaves every row a key
    deep = 0  # steps that may add numbers so low that two of them are -inf
    for step in logits.steps:
        if isinstance(step, Fill) and math.isinf(step.fill):
            infinite.append(_always_open(step))
        elif isinstance(step, Fill):
            deep = 1
        elif isinstance(step, AddMask) and not is_small(step.mask):
            if step.negative or not never_minus_infinity(step.mask):
                infinite.append(not step.negative and opens_every_row(step.mask))
            deep += 1
            if deep > 1:
                infinite.append(False)
        elif isinstance(step, Multiply) and deep and step.factor > 1:
            infinite.append(False)
    return len(infinite) > 1 or infinite == [False]


def _is_exact(steps: Sequence[Step], index: int, dtype: ir.DataType) -> bool:
    """Whether the fill at `index` may stand in the mask as it is."""
    step = steps[index]
    assert isinstance(step, Fill)
    if math.isinf(step.fill):
        return True
    return all(is_deep(number, dtype) or math.isinf(number) for number in _numbers(steps, index))


def _numbers(steps: Sequence[Step], index: int) -> list[float]:
    """What becomes of the fill at `index`: itself, and what it is after every later factor."""
    step = steps[index]
    assert isinstance(step, Fill)
    numbers = [step.fill]
    for later in steps[index + 1 :]:
        if isinstance(later, Multiply):
            numbers.append(numbers[-1] * later.factor)
    return numbers


def _check_weak(logits: Logits, weak: Sequence[int], dtype: ir.DataType) -> Failure | None:
    steps, where = logits.steps, (logits.product,)
    ends = {_numbers(steps, i)[-1] for i, s in enumerate(steps) if isinstance(s, Fill) and math.isfinite(s.fill)}
    first = steps[weak[0]]
    assert isinstance(first, Fill)
    if len(ends) > 1:
        both = " and ".join(f"{number:g}" for number in sorted(ends))
        return Failure(f"masked logits come to two numbers, {both}: a row without keys tells them apart", where)
    (end,) = ends
    swallowed = _step_at(end, dtype) / 4
    for i, step in enumerate(steps):
        if not isinstance(step, AddMask):
            continue
        added = f"{step.mask.name} is added to logits"
        if i < weak[0] and not is_small(step.mask, min(_LEARNED, -end / 100)):
            return Failure(f"{added} before they are filled with {first.fill:g}: masked keys would change", where)
        if i > weak[0] and not is_small(step.mask, swallowed):
            return Failure(f"{added} that are filled with {first.fill:g}: a row without keys would change", where)
    if dtype is ir.DataType.FLOAT16:
        fills = [s for s in steps if isinstance(s, Fill)]
        if len(fills) > 1 or not _always_open(fills[0]):
            return Failure(f"float16 logits are filled with {first.fill:g}: a row without keys would change", where)
        return None if end <= _LOWEST_HALF else _check_reach(logits, end)
    return None if end <= FAR_BELOW else _check_reach(logits, end)


def _step_at(number: float, dtype: ir.DataType) -> float:
    """The distance of a number to the next larger one in size, in its type."""
    finfo: Any = ml_dtypes.finfo
    return float(2.0 ** math.floor(math.log2(abs(number))) * float(finfo(dtype.numpy()).eps))


def _check_reach(logits: Logits, end: float) -> Failure | None:
    """Whether logits can come as low as masked ones."""
    factors = math.prod(s.factor for s in logits.steps if isinstance(s, Multiply))
    added = sum(_size(s.mask) for s in logits.steps if isinstance(s, AddMask)) * max(factors, 1.0)
    if logits.softcap and logits.softcap + added < -end - _VANISHES:
        return None
    reason = f"masked logits come to {end:g}, which is not far below what logits may be: masked keys may keep a weight"
    return Failure(reason, (logits.product,))


def _size(mask: ir.Value) -> float:
    """A bound for a mask that is known to be small."""
    return next(limit for limit in (1.0, 30.0, 1e3, 3e4, _LEARNED) if is_small(mask, limit))


def _always_open(step: Fill) -> bool:
    """Whether every row of a constant condition keeps at least one key."""
    data = constant(step.condition, max_elements=1 << 22)
    if data is None or data.ndim == 0 or not data.shape[-1]:
        return False
    return bool((data.astype(bool) == step.keeps).any(axis=-1).all())


def _check_sums(logits: Logits, dtype: ir.DataType) -> Failure | None:
    """Additive masks whose sum rounds differently when it is taken before the logits come in."""
    adds = [(i, step) for i, step in enumerate(logits.steps) if isinstance(step, AddMask)]
    large = [i for i, step in adds if not is_small(step.mask)]
    if len(large) > 1 and any(isinstance(s, Multiply) and s.factor < 1 for s in logits.steps[large[1] :]):
        reason = "masks whose sum may overflow are scaled down afterwards: folding the factor in would hide that"
        return Failure(reason, (logits.product,))
    for i, step in adds:
        others = [other for _, other in adds if other is not step and not is_switch(other.mask, dtype)]
        later = [s.factor for s in logits.steps[i + 1 :] if isinstance(s, Multiply)]
        scaled = any(math.frexp(factor)[0] != 0.5 for factor in later)
        number = coarse_number(step.mask, dtype) if others or scaled else None
        if number is not None:
            what = "scaled afterwards" if scaled else f"added beside {others[0].mask.name}"
            reason = f"the mask {step.mask.name} with its {number:g} rounds the logits and is {what}"
            return Failure(f"{reason}: a row without keys would change", (logits.product,))
    return None
