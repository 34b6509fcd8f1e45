"""The graphs of benchmarks/torch_differential.py: every model of the benchmarks of capture, raising, rewriting, norms.

Names, by the benchmark that they come from:

    timm/<family>, transformers/<type>                      capture.py
    raising/<family>-<attention>-<exporter>-<opset>         raising.py, exported anew
    reparam/<variant>, adapter/<name>                       reparam.py: training form, unmerged adapters
    norms/<case>                                            norms.py
    peers/<model>                                           peers.py, at batch 1
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from zoo import vision_stub  # noqa: F401  must come before timm and transformers

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Subject:
    """A captured graph and the inputs to run it on, one set for each size."""

    graph: ir.Model
    feeds: list[Feeds]


def names() -> list[str]:
    """All of them, the longest runs last."""
    import norms_models
    import peers_models
    import raising
    import raising_models
    import reparam_adapters
    import reparam_models
    from capture import architectures

    exports = [
        f"raising/{family.name}-{attention}-{exporter}-{opset}"
        for family in raising_models.families()
        for exporter, opset, attention in raising.VARIANTS
    ]
    return [
        *(f"norms/{case.name}" for case in (*norms_models.cases(), *norms_models.traps())),
        *(f"adapter/{name}" for name in reparam_adapters.names()),
        *architectures(),
        *(f"reparam/{name}" for name in reparam_models.MODELS),
        *(f"peers/{name}" for name in peers_models.MODELS),
        *exports,
    ]


def build(name: str) -> Subject:
    """Capture one. What an exporter cannot export raises RuntimeError."""
    group, _, key = name.partition("/")
    match group:
        case "raising":
            return _exported(key)
        case "reparam":
            import reparam_models

            module, image = reparam_models.build(key)
            return _captured(module.float(), (image.float(),), {})
        case "adapter":
            import reparam_adapters

            case = reparam_adapters.build(key)
            return _captured(case.adapted, (), dict(case.inputs))
        case "norms":
            import norms_models

            found = {case.name: case for case in (*norms_models.cases(), *norms_models.traps())}[key]
            return _captured(found.make(), found.inputs(0), {})
        case "peers":
            import peers_models

            model = peers_models.MODELS[key]
            feeds = peers_models.as_tensors(peers_models.example(model, model.batches[0]))
            return _captured(peers_models.built(model), (), feeds)
    import capture

    return _captured(*capture.build(name))


def _captured(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
    import copy

    from xform.capture import capture_torch
    from xform.capture.torch_pytree import register_classes

    register_classes([args, kwargs])
    # modules write into the caches that they are given
    captured = capture_torch(module, copy.deepcopy(args), copy.deepcopy(kwargs))
    return Subject(captured.model, [{n: t.detach().numpy() for n, t in captured.flatten(args, kwargs).items()}])


def _exported(key: str) -> Subject:
    import onnx
    from raising_models import export, families

    from xform.capture.onnx_file import capture_onnx

    family_name, attention, exporter, opset = key.rsplit("-", 3)
    family = {family.name: family for family in families()}[family_name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.onnx"
        made = export(family, exporter, int(opset), attention, path)
        graph = capture_onnx(onnx.load(path))
    sizes = family.sizes if made.dynamic else family.sizes[:1]
    return Subject(graph, [_of_graph(graph, family.arrays(size, seed)) for seed, size in enumerate(sizes)])


def _of_graph(graph: ir.Model, arrays: Feeds) -> Feeds:
    return {value.name or "": np.asarray(arrays[value.name or ""]) for value in graph.graph.inputs}
