"""Calls of a module: its arguments, the inputs to verify on, and the module itself as the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from xform.capture.torch_module import CapturedModule
from xform.capture.torch_onnx import WRITTEN
from xform.capture.torch_twin import twin_of
from xform.errors import UsageError


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` of a call from the forms that `optimize` takes."""
    match inputs:
        case (tuple() | list() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
        case Mapping():
            return (), dict(inputs)
        case tuple() | list():
            return tuple(inputs), {}
        case _:
            return (inputs,), {}


def verification_inputs(captured: CapturedModule, example: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The call's own inputs, and others where it gave one tensor several times."""
    sets: list[dict[str, Any]] = [dict(example)]
    if captured.aliased:
        sets.append({**example, **told_apart({name: example[name] for name in captured.aliased})})
    return sets


def told_apart(tensors: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Other values of the same kind: each tensor's own in another order, so that ids stay ids and masks masks.

    Floats are scaled by random factors from 0.5 to 1.5 as well, as all of them may be equal.
    """
    rng = np.random.default_rng(seed)
    others = {}
    for name, tensor in tensors.items():
        values = tensor.reshape(-1)[torch.from_numpy(rng.permutation(tensor.numel())).to(tensor.device)]
        if tensor.is_floating_point() or tensor.is_complex():
            factors = torch.from_numpy(rng.uniform(0.5, 1.5, tensor.numel())).to(tensor.device)
            values = (values * factors).to(tensor.dtype)
        others[name] = values.reshape(tensor.shape)
    return others


def module_oracle(
    module: torch.nn.Module | ExportedProgram, captured: CapturedModule, example: Mapping[str, torch.Tensor]
) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    """The module itself as a function from graph inputs to graph outputs.

    Each run is one of a new stand-in with buffers of its own, and parameters where forward writes into them, on copies
    of the inputs.
    """
    callee = module.module() if isinstance(module, ExportedProgram) else module
    written = captured.model.meta.get(WRITTEN, ())

    def run(inputs: Mapping[str, Any]) -> Sequence[Any]:
        tensors = {name: torch.as_tensor(value).to(example[name]).clone() for name, value in inputs.items()}
        args, kwargs = captured.call_form(tensors)
        refused = captured.refuses(args, kwargs)
        if refused is not None:
            raise UsageError(f"this call would need another graph: {refused}")
        with twin_of(callee, own_tensors=True, written=written) as twin:
            return captured.leaves(twin(*args, **kwargs))

    run.name = "the module, run by PyTorch"  # type: ignore[attr-defined]
    return run


def check_runs(
    name: str, oracle: Callable[[Mapping[str, Any]], Sequence[Any]], example: Mapping[str, torch.Tensor]
) -> None:
    """Raise UsageError, with the module's own error, where the module itself does not take these inputs.

    torch.export computes with shapes and dtypes only, and lets through what no kernel takes.
    """
    try:
        oracle(example)
    except Exception as error:
        raise UsageError(
            f"{name} itself fails with these arguments: {type(error).__name__}: {error}",
            hint="call the module itself with them, and give them as it takes them",
        ) from error
