"""Opening an ONNX Runtime session on a graph without copying its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from xform.backends.onnxruntime.available import PROVIDERS
from xform.errors import KernelError, TargetError

ITS_OWN = "its own optimizations, without which it loads"
_NO_KERNEL = re.compile(r"Could not find an implementation for (?P<op>\w+)\(\d+\) node with name '(?P<node>[^']*)'")
_WITHOUT_KERNEL = "leave backend out or use backend='torch_triton', or convert the model to float32"
_LEND_FROM_BYTES = 4096  # smaller initializers travel in the graph, where shape inference reads them


@dataclass(frozen=True)
class SessionSettings:
    """What a session is opened with.

    Attributes:
        intra_op_threads: Threads inside one operator: one per physical core, since hyperthreads share the vector units.
        inter_op_threads: Operators run one after the other; running them side by side only splits the same cores.
        graph_optimization: ONNX Runtime's own level. The lowered spellings rely on its fusions.
        spinning: Threads wait for the next operator by spinning: faster for one model on cores of its own, wasteful
            beside other work.
        cpu_arena: Memory is kept between runs.
        memory_pattern: Memory of static shapes is planned once.
    """

    intra_op_threads: int
    inter_op_threads: int = 1
    graph_optimization: str = "all"
    spinning: bool = True
    cpu_arena: bool = True
    memory_pattern: bool = True

    def options(self) -> Any:
        """As ONNX Runtime takes them."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.intra_op_threads
        options.inter_op_num_threads = self.inter_op_threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.enable_cpu_mem_arena = self.cpu_arena
        options.enable_mem_pattern = self.memory_pattern
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spinning)))
        options.log_severity_level = 4  # errors are raised as well; a log line would show a name unescaped
        return options


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1; logical ones where the system does not tell."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            return max(len(allowed), 1)
    return max(len(cores), 1)


def open_session(model: ir.Model, settings: SessionSettings) -> tuple[Any, list[Any]]:
    """A session, and the arrays that it reads its weights from and that must outlive it.

    Raises:
        KernelError: ONNX Runtime lacks a kernel.
        TargetError: It refuses the graph for another reason.
    """
    proto, lent = _serialize(model)
    data = b""
    try:
        data = proto.SerializeToString()
        session = _session(data, lent, settings.options())
    except Exception as error:
        missing = _NO_KERNEL.search(str(error))
        if missing is not None:
            dtype = _dtype_of(model, missing["op"], missing["node"])
            raise KernelError("ONNX Runtime", missing["op"], missing["node"], dtype, hint=_WITHOUT_KERNEL) from error
        said = f"cannot load the lowered graph: {_first_line(error)}"
        if data and _loads_as_it_is(data, lent, settings):
            said = f"breaks the lowered graph by {ITS_OWN}: {_first_line(error)}"
        raise TargetError(
            f"ONNX Runtime {ort.__version__} {said}",
            hint="run `xform inspect` on the saved result, or install a newer onnxruntime",
        ) from error
    return session, list(lent.values())


def _session(data: bytes, lent: Mapping[str, Any], options: Any) -> Any:
    if lent:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in lent.values()]
        options.add_external_initializers(list(lent), values)
    return ort.InferenceSession(data, options, providers=list(PROVIDERS))


def _loads_as_it_is(data: bytes, lent: Mapping[str, Any], settings: SessionSettings) -> bool:
    """Whether the runtime loads a graph that it refused, if it leaves it as it is."""
    options = settings.options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        _session(data, lent, options)
    except Exception:  # that it does not is the answer
        return False
    return True


def _dtype_of(model: ir.Model, operator: str, name: str) -> str:
    """Dtype of the first input of the node that ONNX Runtime names; nodes that its own fusions made are not there."""
    named = [n for n in model.graph.all_nodes() if n.op_type == operator and n.name == name]
    values = [v for n in named for v in n.inputs if v is not None]
    values = values or [*model.graph.inputs, *model.graph.outputs]
    dtypes = [v.dtype for v in values if v.dtype is not None]
    if not dtypes:
        return "an unknown dtype"
    return "string" if dtypes[0] is ir.DataType.STRING else str(dtypes[0].numpy())


def _serialize(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph as a proto without its large initializers, and these as arrays by name; the model is left as it was."""
    lent: dict[str, Any] = {}
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes >= _LEND_FROM_BYTES and _lendable(tensor.dtype) and not value.is_graph_input():
                lent[name] = np.require(tensor.numpy(), requirements=["C", "A"])
                kept.append((value, tensor))
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor("lent", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
            elif isinstance(tensor, ir.ExternalTensor):
                kept.append((value, tensor))
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        return ir.to_proto(model), lent
    finally:
        for value, tensor in kept:
            value.const_value = tensor


def _lendable(dtype: ir.DataType) -> bool:
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED) or dtype.bitwidth < 8:
        return False
    return dtype.numpy().kind in "fiub" and dtype.numpy().isbuiltin == 1


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:400] if lines else type(error).__name__
