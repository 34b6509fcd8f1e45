"""Running a graph for its numbers: ONNX Runtime with every graph optimization off, on the CPU.

Weights are lent to the runtime, not copied: large initializers are declared external in the serialized graph and handed
over as OrtValues that point into the tensors' own memory (or memory map). So a graph of any size runs without a
temporary file and without the 2 GB limit of protobuf. Sessions are released as soon as the numbers are there. Inside
`xform.pipeline.isolated.isolated_runtime()` graphs run in child processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from xform import limits
from xform.errors import LimitError, ModelError, VerificationError
from xform.graph.clone import clone
from xform.graph.downgrade import downgrade
from xform.graph.downgrade_attention import written_out
from xform.pipeline.bounded_run import check_sizes, fed_bytes, run_bounded, share_arena
from xform.pipeline.isolated import Child, isolation_timeout

Inputs = Mapping[str, Any]
Outputs = dict[str, Any]
Oracle = Callable[[Inputs], Mapping[str, Any] | Sequence[Any]]

LEND_FROM_BYTES = 4096  # smaller initializers travel in the graph, where the runtime's shape inference can read them
_MAX_IR_VERSION = 10  # ONNX Runtime refuses files stamped newer than it knows; the stamp itself changes nothing
_THREADS = 2
_LOAD_S = 30.0  # a process of its own has at least so long to start and load
# end the process instead of raising on an empty batch or sequence: Einsum divides by it, the others call std::terminate
_ABORT_ON_NOTHING = frozenset({"Einsum", "GRU", "LSTM"})
_NEWEST_OPSET = re.compile(r"official support for domain ai\.onnx is till opset (\d+)")
_SOURCE_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) (?=\w)")
# dtypes that NumPy lacks cross the boundary as float32 through a Cast that is exact
_NO_NUMPY = {
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT8E4M3FNUZ,
    onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
}


class CouldNotRunError(VerificationError):
    """The runtime refused the graph or failed while running it, so there are no numbers to compare."""


class Session:
    """One graph, ready to run. Use as a context manager, so that its memory is released.

    Args:
        model: The graph, left as it is; or a ModelProto, which is run as it is and becomes the session's own.
        threads: Intra-op threads.
        folder: Where a ModelProto's external data lies.
        path: A file that holds the ModelProto: the runtime reads it from there where it can be run as it is.

    Raises:
        CouldNotRunError: The graph cannot be serialized, or the runtime refuses it.
    """

    def __init__(
        self,
        model: ir.Model | onnx.ModelProto,
        *,
        threads: int = _THREADS,
        folder: Path | None = None,
        path: Path | None = None,
    ) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._child: Child | None = None
        self._session: Any = None
        self._in_arena = False
        self._brought = 0  # bytes of large weights: what a run may take depends on it
        self._model: ir.Model | None = None
        if isinstance(model, onnx.ModelProto):
            self._output_names = [value.name for value in model.graph.output]
            newer = model.ir_version > _MAX_IR_VERSION
            model.ir_version = min(model.ir_version, _MAX_IR_VERSION)
            self._brought = _stored_bytes(model, folder)
            self._path = path if not _widen_interface(model.graph) and not newer else None
            self._start(model, {}, threads)
            return
        self._output_names = [value.name or "" for value in model.graph.outputs]
        self._model = model = written_out(model)  # by the definition, from which the runtime's kernel departs
        try:
            self._load(model, threads)
        except CouldNotRunError as error:
            newest = _NEWEST_OPSET.search(error.what)
            if newest is None or model.opset_imports.get("", 0) <= int(newest[1]):
                raise
            self._load(_downgraded(model, int(newest[1])), threads)

    def _load(self, model: ir.Model, threads: int) -> None:
        try:
            proto, lent = serialize(model)
        except Exception as error:
            raise CouldNotRunError(f"the graph could not be serialized: {_first_line(error)}") from error
        self._start(proto, lent, threads)

    def _start(self, proto: onnx.ModelProto, lent: dict[str, Any], threads: int) -> None:
        self._casts = _widen_interface_names(proto)
        self._brought += sum(array.nbytes for array in lent.values())
        self._lent = lent  # the runtime reads this memory for as long as the session lives
        self._may_abort = bool(_operators(proto) & _ABORT_ON_NOTHING)
        self._proto, self._threads = (proto if self._may_abort else None), threads
        timeout = isolation_timeout()
        try:
            if timeout is not None:
                self._child = Child(proto, lent, threads, timeout, self._folder)
            else:
                self._session, self._in_arena = self._opened(proto, lent, threads)
        except Exception as error:
            raise CouldNotRunError(f"ONNX Runtime does not load the graph: {_first_line(error)}") from error

    def _opened(self, proto: onnx.ModelProto, lent: dict[str, Any], threads: int) -> tuple[Any, bool]:
        if self._path is not None:
            try:
                return _in_process(str(self._path), lent, threads, self._brought, self._folder)
            except Exception:  # a name that the runtime cannot open, or takes for another format: what is in it counts
                self._path = None
        return _in_process(proto.SerializeToString(), lent, threads, self._brought, self._folder)

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs by name.

        Raises:
            CouldNotRunError: The runtime failed on these inputs.
            LimitError: The run takes more memory or time than the model is allowed.
        """
        feeds = {}
        for name, value in inputs.items():
            cast = self._casts.get(name)
            feeds[cast or name] = np.asarray(value, np.float32) if cast else value
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        empty = any(array.size == 0 for array in arrays.values())
        brought = self._brought + fed_bytes(arrays)
        if self._model is not None:
            check_sizes(self._model, {name: array.shape for name, array in arrays.items()}, brought)
        try:
            if self._child is not None:
                results = self._child.run(feeds)
            elif self._may_abort and empty:
                results = self._run_apart(feeds, limits.allowed("seconds", brought))
            else:
                results = run_bounded(self._session, feeds, self._brought, self._in_arena)
        except LimitError:
            raise
        except Exception as error:
            raise CouldNotRunError(f"ONNX Runtime failed: {_first_line(error)}") from error
        return dict(zip(self._output_names, results, strict=True))

    def _run_apart(self, feeds: Mapping[str, Any], seconds: float) -> list[Any]:
        """Run in a child process that the runtime may end."""
        assert self._proto is not None
        child = Child(self._proto, self._lent, self._threads, seconds, self._folder, max(seconds, _LOAD_S))
        try:
            return child.run(feeds)
        finally:
            child.close()

    def close(self) -> None:
        """Release the session and the lent weights."""
        if self._child is not None:
            self._child.close()
        self._session = self._child = None
        self._lent = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _in_process(
    data: bytes | str, lent: Mapping[str, Any], threads: int, brought: int, folder: Path | None
) -> tuple[Any, bool]:
    """A session of a serialized graph or a file, and whether it allocates in the bounded arena."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_reuse = False  # planning it is quadratic where sizes are unknown; values are freed either way
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if lent:
        values = [_ort_value(array) for array in lent.values()]
        options.add_external_initializers(list(lent), values)
    in_arena = share_arena(options, brought)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]), in_arena


def _ort_value(array: Any) -> Any:
    """The array as the runtime's own value, in the same memory."""
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    onnx_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    bits = array.view(f"u{array.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx_type)


def run_model(model: ir.Model, cases: Sequence[Inputs]) -> list[Outputs]:
    """Outputs of `model` for each of `cases`; the session is gone afterwards."""
    with Session(model) as session:
        return [session.run(case) for case in cases]


def call_oracle(oracle: Oracle, inputs: Inputs, output_names: Sequence[str]) -> Outputs:
    """Outputs of a callable reference (a torch module, say) by graph output name.

    Raises:
        CouldNotRunError: It raised, or gave another number of outputs than the graph has.
    """
    try:
        results = oracle(inputs)
    except Exception as error:
        raise CouldNotRunError(f"the reference failed: {_first_line(error)}") from error
    if isinstance(results, Mapping):
        missing = [name for name in output_names if name not in results]
        if missing:
            raise CouldNotRunError(f"the reference gives no output named {missing[0]!r}")
        return {name: to_numpy(results[name]) for name in output_names}
    if len(results) != len(output_names):
        raise CouldNotRunError(f"the reference gives {len(results)} outputs, the graph {len(output_names)}")
    return {name: to_numpy(value) for name, value in zip(output_names, results, strict=True)}


def to_numpy(value: Any) -> Any:
    """A torch tensor, number or array as an array; sequences element by element; None stays."""
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | bool | str):
        return [to_numpy(element) for element in value]
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) in ("torch.bfloat16",) or "float8" in str(value.dtype):
            value = value.float()
        return value.numpy()
    return np.asarray(value)


def serialize(model: ir.Model, *, lend: bool = True) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model as a proto whose large initializers are left out, and those initializers as arrays by name.

    Inputs and outputs of dtypes that NumPy lacks get an exact Cast from or to float32 (see `_widen_interface`).
    The model itself is as before when this returns.
    """
    lent: dict[str, Any] = {}
    unread: set[str] = set()  # the runtime drops what nothing reads, and then cannot find what is lent to it
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or value.is_graph_input():
                continue
            if not value.uses() and not value.is_graph_output():
                unread.add(name)
                kept.append((value, tensor))
                value.const_value = _placeholder(name, tensor)
            elif lend and tensor.nbytes >= LEND_FROM_BYTES and _lendable(tensor.dtype):
                lent[name] = _aligned(tensor.numpy())
                kept.append((value, tensor))
                value.const_value = _placeholder(name, tensor)
            elif isinstance(tensor, ir.ExternalTensor):
                kept.append((value, tensor))
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        proto = ir.to_proto(model)
    finally:
        for value, tensor in kept:
            value.const_value = tensor
    if unread:
        read = [tensor for tensor in proto.graph.initializer if tensor.name not in unread]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(read)
    proto.ir_version = min(proto.ir_version, _MAX_IR_VERSION)
    _widen_interface(proto.graph)
    return proto, lent


def _placeholder(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        "lent", 0, tensor.nbytes, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
    )


def _lendable(dtype: ir.DataType) -> bool:
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED) or dtype.bitwidth < 8:
        return False
    return dtype.numpy().kind in "fiub" or dtype is ir.DataType.BFLOAT16


def _aligned(array: Any) -> Any:
    array = np.ascontiguousarray(array)
    return array if array.flags.aligned else array.copy()


def _stored_bytes(proto: onnx.ModelProto, folder: Path | None) -> int:
    """What a model's weights take. Tensors may overlap in data files, so these count by their sizes."""
    stored = 0
    files: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            files.update(entry.value for entry in tensor.external_data if entry.key == "location")
        elif tensor.data_type != onnx.TensorProto.STRING:
            stored += prod(tensor.dims) * max(ir.DataType(tensor.data_type).bitwidth, 8) // 8
    return stored + sum((folder / name).stat().st_size for name in files if folder is not None)


def _widened(name: str) -> str:
    return name + "__as_float32"


def _widen_interface(graph: onnx.GraphProto) -> bool:
    """Give every input and output of a dtype without NumPy type a float32 twin and a Cast in between.

    Returns:
        Whether there was one.
    """
    nodes = len(graph.node)
    initialized = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        dtype = value.type.tensor_type.elem_type
        if value.type.HasField("tensor_type") and dtype in _NO_NUMPY and value.name not in initialized:
            cast = onnx.helper.make_node("Cast", [_widened(value.name)], [value.name], to=dtype)
            graph.node.insert(0, cast)
            value.name = _widened(value.name)
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for value in graph.output:
        dtype = value.type.tensor_type.elem_type
        if value.type.HasField("tensor_type") and dtype in _NO_NUMPY:
            to = onnx.TensorProto.FLOAT
            graph.node.append(onnx.helper.make_node("Cast", [value.name], [_widened(value.name)], to=to))
            value.name = _widened(value.name)
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return len(graph.node) > nodes


def _widen_interface_names(proto: onnx.ModelProto) -> dict[str, str]:
    suffix = _widened("")
    return {v.name.removesuffix(suffix): v.name for v in proto.graph.input if v.name.endswith(suffix)}


def _downgraded(model: ir.Model, opset: int) -> ir.Model:
    """The same graph at an opset that the runtime knows.

    Raises:
        CouldNotRunError: An operator cannot be said there.
    """
    copy = clone(model)
    try:
        downgrade(copy, opset)
    except ModelError as error:
        raise CouldNotRunError(f"ONNX Runtime knows opsets up to {opset}: {error.what}", where=error.where) from error
    return copy


def _operators(proto: onnx.ModelProto) -> set[str]:
    """The operators of a model, those of branches, loops and functions too."""
    found: set[str] = set()
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while nodes:
        node = nodes.pop()
        found.add(node.op_type)
        for held in node.attribute:
            nodes.extend(inner for graph in (held.g, *held.graphs) for inner in graph.node)
    return found


def _first_line(error: Exception) -> str:
    """The first line of a message, without the place in the runtime's sources that some begin with."""
    lines = str(error).strip().splitlines()
    return _SOURCE_PLACE.sub("", lines[0])[:500] if lines else type(error).__name__
