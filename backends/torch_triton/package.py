"""AOTInductor packages: compiled code and weights in one `.pt2` file that torch loads with nothing else installed.

model = torch._inductor.aoti_load_package("m.pt2")
outputs = model(*inputs)            # in the order of the graph's inputs
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch.export import Dim

from xform.backends.base import check_names
from xform.backends.torch_triton.lower.dtypes import TORCH_DTYPES
from xform.errors import ModelError, TargetError, UsageError
from xform.graph import dims
from xform.graph.atomic import Staged, output_error, remove_leftovers, resolve

if TYPE_CHECKING:
    from xform.backends.torch_triton import TorchArtifact

_NAMES = "xform.names"  # key in a package's metadata: its inputs and outputs
_SIZES = (
    2,
    16,
    3,
    5,
    7,
    11,
)  # of dynamic dims to trace with, in the order of their names' appearance; 1 would be fixed


def save_package(artifact: TorchArtifact, path: Path) -> list[Path]:
    """Compile the module and write the package.

    Raises:
        TargetError: There is no device or no C++ compiler, or the module cannot be traced.
        OutputError: It cannot be written.
    """
    target = resolve(path)
    device = torch.device(artifact.target.kind)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(
            "a .pt2 package for cuda is compiled on the GPU that it is for, and there is none here",
            hint="save it on a machine with a GPU, or save `.safetensors` or `.onnx` here",
        )
    _demand_compiler()
    exported = _exported(artifact, device)
    names = {"inputs": [v.name for v in artifact.model.graph.inputs]}
    names["outputs"] = [v.name for v in artifact.model.graph.outputs]
    options: dict[str, Any] = {"aot_inductor.metadata": {_NAMES: json.dumps(names)}}
    options |= {"max_autotune": True} if artifact.compile == "max-autotune" else {}
    try:
        remove_leftovers(target)
        with Staged(target) as staged:
            # the package is a zip file, written whole in memory-mapped pieces by torch; it wants a .pt2 name
            working = staged.path.with_name(f"{staged.path.name}.pt2")
            try:
                with _quiet():
                    torch._inductor.aoti_compile_and_package(
                        exported, package_path=str(working), inductor_configs=options
                    )
                staged.file.write(working.read_bytes())
            finally:
                working.unlink(missing_ok=True)
            staged.finish()
            staged.commit(target)
    except OSError as error:
        raise output_error(error, target) from error
    return [target]


class PackageRunner:
    """A loaded package; see `xform.backends.base.Runner`.

    Raises:
        ModelError: The file is not a package that `save_package` wrote.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._package: Any = torch._inductor.aoti_load_package(str(path))
            names = json.loads(self._package.get_metadata()[_NAMES])
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            text = str(error).strip().splitlines()
            raise ModelError(
                f"the package cannot be loaded: {text[0][:400] if text else type(error).__name__}", where=str(path)
            ) from error
        self.input_names: tuple[str, ...] = tuple(names["inputs"])
        self.output_names: tuple[str, ...] = tuple(names["outputs"])

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """See `xform.backends.base.Runner.run`."""
        if self._package is None:
            raise UsageError("this runner was closed", hint="load the package again")
        check_names(feeds, self.input_names, self.input_names)
        as_torch = any(isinstance(value, torch.Tensor) for value in feeds.values())
        try:
            outputs = self._package(*[torch.as_tensor(feeds[name]) for name in self.input_names])
        except RuntimeError as error:
            raise UsageError(
                f"the package does not take these inputs: {str(error).strip().splitlines()[0][:400]}",
                hint="give inputs of the dtypes and sizes that it was saved for",
            ) from error
        return list(outputs) if as_torch else [output.numpy() for output in outputs]

    def close(self) -> None:
        """See `xform.backends.base.Runner.close`."""
        self._package = None


def _demand_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise TargetError(
            "a .pt2 package is compiled by a C++ compiler, and none was found",
            hint="install one (apt-get install g++), or name it in the environment variable CXX",
        ) from error


def _exported(artifact: TorchArtifact, device: torch.device) -> Any:
    """The module as a traced program whose named dims are dynamic."""
    inputs = list(artifact.model.graph.inputs)
    sizes = _sizes(inputs, artifact.examples)
    examples = tuple(_example(value, artifact.examples.get(value.name or ""), sizes, device) for value in inputs)
    shapes = tuple(_dynamic_dims(value) for value in inputs)
    module = artifact.module.to(device)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises errors of many kinds here, all about what cannot be traced
        text = str(error).strip().splitlines()
        raise TargetError(
            f"the module cannot be traced for a .pt2 package: {text[0][:400] if text else type(error).__name__}",
            hint="save `.safetensors` or `.onnx`, or capture the model with static sizes",
        ) from error


def _dynamic_dims(value: ir.Value) -> Any:
    if value.shape is None:
        return None
    return {axis: Dim.DYNAMIC for axis, dim in enumerate(value.shape) if not isinstance(dim, int)} or None


def _sizes(inputs: list[ir.Value], examples: dict[str, Any]) -> dict[str, int]:
    """A number for each name in the dims: as in the example, if that is not 1."""
    sizes: dict[str, int] = {}
    for value in inputs:
        example = examples.get(value.name or "")
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int) or dim.value is None or dim.value in sizes:
                continue
            seen = int(example.shape[axis]) if isinstance(example, torch.Tensor) else 1
            sizes[dim.value] = seen if seen > 1 else _SIZES[len(sizes) % len(_SIZES)]
    return sizes


def _example(value: ir.Value, seen: Any, sizes: dict[str, int], device: torch.device) -> torch.Tensor:
    """A tensor to trace with: one that the module has run on, if its sizes fit, else ones or random numbers."""
    dtype = None if value.dtype is None else TORCH_DTYPES.get(value.dtype)
    if value.shape is None or dtype is None or not isinstance(value.type, ir.TensorType):
        raise TargetError(
            "a .pt2 package takes tensors of known rank and dtype only",
            where=value.name or "",
            hint="save `.safetensors` or `.onnx`",
        )
    shape = [dim if isinstance(dim, int) else _size(dim.value, sizes) for dim in value.shape]
    if isinstance(seen, torch.Tensor) and list(seen.shape) == shape:
        return seen.to(device)
    if dtype.is_floating_point:
        return torch.randn(shape, device=device, generator=None).to(dtype)
    return torch.ones(shape, dtype=dtype, device=device)


def _size(name: str | None, sizes: dict[str, int]) -> int:
    if name is None:
        return _SIZES[0]
    return sizes[name] if name in sizes else dims.evaluate(dims.parse(name), sizes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what it tries while tracing; what fails is raised as well."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
