"""Whether the weights that a model was optimized with are still what they were.

The graph shares memory with the module or the file that it came from, so that no weight is held twice. The price is
that someone may write there. Versions and identities tell of most changes, at some nanoseconds per tensor, so they are
compared at every call. Checksums of the contents tell of all changes; they are compared before anything is saved. What
else a module is made of (attributes, submodules, hooks, configurations) is built into the graph, and compared in turn.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.nn.modules import module as torch_module

from xform.capture.torch_onnx import WRITTEN
from xform.capture.torch_program import ASSIGNED
from xform.capture.torch_pytree import is_lazy
from xform.capture.torch_settings import Settings
from xform.errors import MAX_PLACES, VerificationError
from xform.graph.write import weight_files

_VERSION = attrgetter("_version")
_SAMPLED = 16  # elements looked at per tensor, where only a sample is
_LOOKS = 16  # at least so many samples and objects are looked at in a call, each in less than a microsecond
_BYTES_PER_LOOK = 500_000  # and one more for so many bytes of weights, which take a hundred times as long to read
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Sample = tuple[torch.Tensor, int, Any, bytes]
_registrations = 0  # how often any module got a parameter, a buffer or a submodule
_hooked = False
_HOOKING = threading.Lock()


def _count(*_: Any) -> None:
    global _registrations
    _registrations += 1


def _watch_registrations() -> None:
    """Let torch tell when a module gets another parameter, buffer or submodule: comparing them all takes longer."""
    global _hooked
    with _HOOKING:
        if not _hooked:
            torch_module.register_module_parameter_registration_hook(_count)
            torch_module.register_module_buffer_registration_hook(_count)
            torch_module.register_module_module_registration_hook(_count)
            _hooked = True


class ModuleWeights:
    """The parameters, buffers and settings of a module as they are now.

    Args:
        module: The module.
    """

    def __init__(self, module: torch.nn.Module | ExportedProgram) -> None:
        _watch_registrations()
        self._module = module
        self._written: frozenset[str] = frozenset()
        self._settings = None if isinstance(module, ExportedProgram) else Settings(module)
        self._seen = _registrations
        self._tensors = self._now()
        self._versions = {name: t._version for name, t in self._tensors.items() if not t.is_inference()}
        self._samples = list(_samples(self._tensors))
        self._arrange()

    def leave_out(self, graph: ir.Model) -> None:
        """Compare nothing that the module's forward itself writes into, as its captured graph knows it."""
        self._written = frozenset((*graph.meta.get(WRITTEN, ()), *graph.meta.get(ASSIGNED, ())))
        if self._settings is not None:
            self._settings.leave_out(self._written)
        kept = self._now()
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in kept}
        self._arrange()

    def _arrange(self) -> None:
        self._versions = {name: version for name, version in self._versions.items() if name in self._tensors}
        self._tracked = [self._tensors[name] for name in self._versions]
        self._total = sum(self._versions.values())
        kept = set(map(id, self._tensors.values()))
        self._samples = [sample for sample in self._samples if id(sample[0]) in kept]
        looks = [partial(_differs, sample) for sample in self._samples]
        looks = [*(self._settings.looks() if self._settings is not None else ()), *looks]
        total = sum(t.numel() * t.element_size() for t in self._tensors.values())
        self._turn = min(len(looks), _LOOKS + total // _BYTES_PER_LOOK)
        self._looks: list[Callable[[], bool]] = [*looks, *looks[: self._turn]]
        self._next = 0
        self._changed = False

    def changed(self) -> bool:
        """Whether a weight was written or replaced, or a setting changed. Once it is, it stays so.

        Cheap, for every call. Versions tell of every write but those through `.data`, which torch does not count. For
        these, and for settings, some samples and objects are looked at in each call: all of them in small models and in
        those with many weights, and otherwise all within some calls.
        """
        self._changed = self._changed or self._has_changed()
        return self._changed

    def _has_changed(self) -> bool:
        if sum(map(_VERSION, self._tracked)) != self._total:
            return True
        if self._seen != _registrations:
            self._seen = _registrations
            if self._replaced() or (self._settings is not None and self._settings.changed()):
                return True
        if not self._looks:
            return False
        start = self._next
        self._next = (start + self._turn) % (len(self._looks) - self._turn)
        return any(look() for look in self._looks[start : start + self._turn])

    def names(self) -> list[str]:
        """Which weights changed."""
        written = [n for n, version in self._versions.items() if self._tensors[n]._version != version]
        sampled = {id(sample[0]) for sample in self._samples if _differs(sample)}
        unseen = [name for name, tensor in self._tensors.items() if id(tensor) in sampled]
        return list(dict.fromkeys([*written, *self._replaced(), *unseen]))

    def settings(self) -> list[str]:
        """Which attributes, submodules and hooks changed."""
        return [] if self._settings is None else list(self._settings.changed())

    def _replaced(self) -> list[str]:
        now = self._now()
        return [name for name in {**self._tensors, **now} if now.get(name) is not self._tensors.get(name)]

    def _now(self) -> dict[str, torch.Tensor]:
        if isinstance(self._module, ExportedProgram):
            found = {n: t for n, t in self._module.state_dict.items() if isinstance(t, torch.Tensor)}
        else:
            parameters = self._module.named_parameters(remove_duplicate=False)
            found = {**dict(parameters), **dict(self._module.named_buffers(remove_duplicate=False))}
            found.update(self._settings.tensors if self._settings is not None else {})
        return {name: tensor for name, tensor in found.items() if name not in self._written and not is_lazy(tensor)}


def _differs(sample: Sample) -> bool:
    tensor, pointer, view, value = sample
    return tensor.data_ptr() != pointer or view.tobytes() != value


def _samples(tensors: dict[str, torch.Tensor]) -> Iterator[Sample]:
    """Per tensor in the processor's memory: the tensor, its address, a view of some elements, and their values."""
    for tensor in {id(t): t for t in tensors.values()}.values():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.layout is not torch.strided or not tensor.numel() or not tensor.is_contiguous():
            continue
        if (bits := _BITS.get(tensor.element_size())) is None:
            continue
        view = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLED)].view(bits).numpy()
        yield tensor, tensor.data_ptr(), view, view.tobytes()


class SharedWeights:
    """The initializers of a lowered graph whose memory is the module's, with checksums.

    A lazy tensor (a transposed weight, say) is computed from the module's memory when it is written, so it counts too.

    Args:
        lowered: The graph that would be written; None where the artifact has none.
        module: The module.
    """

    def __init__(self, lowered: ir.Model | None, module: torch.nn.Module | ExportedProgram) -> None:
        owned = _storages(module)
        values = () if lowered is None else [v for graph in lowered.graphs() for v in graph.initializers.values()]
        named = {v.name or "": v.const_value for v in values if v.const_value is not None}
        self._tensors = {name: t for name, t in named.items() if isinstance(t, ir.LazyTensor) or _is_in(t, owned)}
        self._sums = {name: _checksum(tensor) for name, tensor in self._tensors.items()}

    def check(self) -> None:
        """Raise VerificationError, naming the weights, where some have other contents than before."""
        changed = [name for name, tensor in self._tensors.items() if _checksum(tensor) != self._sums[name]]
        if changed:
            raise VerificationError(
                "weights of the module changed after the optimized model was verified, so a file would not hold what "
                "was verified",
                where=changed[: MAX_PLACES + 1],
                hint="call xform.optimize(module, ...) again, and save that",
            )


def _storages(module: torch.nn.Module | ExportedProgram) -> list[tuple[int, int]]:
    if isinstance(module, ExportedProgram):
        tensors = [t for t in module.state_dict.values() if isinstance(t, torch.Tensor)]
    else:
        tensors = [*module.parameters(), *module.buffers(), *Settings(module).tensors.values()]
    plain = [t.untyped_storage() for t in tensors if t.layout is torch.strided and t.device.type == "cpu"]
    return sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in plain})


def _is_in(tensor: ir.TensorProtocol, ranges: Sequence[tuple[int, int]]) -> bool:
    if tensor.dtype is ir.DataType.STRING or isinstance(tensor, ir.ExternalTensor):
        return False
    array = tensor.numpy()
    if not array.nbytes:
        return False
    address = array.__array_interface__["data"][0]
    return any(low <= address < high for low, high in ranges)


def _checksum(tensor: ir.TensorProtocol) -> int:
    data: Any = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return zlib.crc32(data)


class FileWeights:
    """The files that a captured graph reads its weights from, as they are now."""

    def __init__(self, captured: ir.Model) -> None:
        self._before = {path: _state(path) for path in weight_files(captured)}

    def check(self) -> None:
        """Raise VerificationError where such a file was changed, replaced or removed."""
        changed = [str(path) for path, before in self._before.items() if _state(path) != before]
        if changed:
            raise VerificationError(
                "a file that the weights are read from changed after the model was read",
                where=changed,
                hint="optimize the model again",
            )


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
