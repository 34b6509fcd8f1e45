"""An ONNX model, optimized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xform.compilation import Compiled
from xform.errors import UsageError
from xform.optimized.base import Optimized
from xform.optimized.weights import FileWeights


class OptimizedGraph(Optimized):
    """An optimized ONNX model.

    Call it with arrays in the order of the graph's inputs, by name, or with one dict of names; it returns a dict of
    output name to array. Torch tensors in give torch tensors out. Calls from several threads are safe.
    """

    def __init__(self, compiled: Compiled, weights: FileWeights) -> None:
        self._result = compiled
        self._weights = weights

    @property
    def _compiled(self) -> Compiled:
        return self._result

    def _check_unchanged(self) -> None:
        self._weights.check()

    def _device(self) -> str:
        return self._result.artifact.target.kind

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run it.

        Raises:
            UsageError: Inputs that are missing or unknown, or of another dtype or rank than declared.
        """
        return run_by_name(self._result.runner, args, kwargs)


def run_by_name(runner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name from inputs in order, by name, or in one dict.

    Raises:
        UsageError: Too many inputs, or one given twice.
    """
    by_name = dict(args[0]) if len(args) == 1 and isinstance(args[0], Mapping) else None
    positional = args if by_name is None else ()
    if len(positional) > len(runner.input_names):
        raise UsageError(f"{len(positional)} inputs were given, the model takes {len(runner.input_names)}")
    feeds = by_name or dict(zip(runner.input_names, positional, strict=False))
    twice = sorted(feeds.keys() & kwargs.keys())
    if twice:
        raise UsageError(f"input {twice[0]!r} was given twice")
    return dict(zip(runner.output_names, runner.run({**feeds, **kwargs}), strict=True))
