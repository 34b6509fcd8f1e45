"""Where in the user's model a capture failed, read from Python's and torch's own stack traces."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from xform.errors import CaptureError

# Frames of these trees are machinery, never the user's model.
_MACHINERY = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_MACHINERY_NAMES = ("<string>", "<frozen", "<eval_with_key>", "onnxscript", "onnx_ir", "contextlib.py")
_TRACE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')

_INPUT = re.compile(r"L\['tensors'\]\[(\d+)\]")

_HINTS: tuple[tuple[str, str], ...] = (
    (
        "data-dependent|GuardOnDataDependent|_local_scalar_dense|unbacked",
        "the value of a tensor steers Python here: compute it with tensor operations (torch.where, masking), "
        "or state its range with torch._check",
    ),
    (
        "Constraints violated|dynamic_shapes|specialized|mark it as dynamic",
        "the model fixes this size: leave the dim out of `dynamic`, narrow its range, or use dynamic='auto'",
    ),
    (
        "fake tensor in the exported program|mutated in the forward",
        "forward writes into a tensor through `.data`, into one that is no buffer, or computes gradients, which "
        "torch.export cannot capture: write into registered buffers only, and compute gradients outside of it",
    ),
    (
        "pytree|Unsupported|unsupported.*type|valid input type|valid output type",
        "pass and return tensors in tuples, lists, dicts or dataclasses; register other classes with "
        "torch.utils._pytree.register_pytree_node",
    ),
    (
        "missing .* required|unexpected keyword|positional argument",
        "call the module with the arguments its forward takes",
    ),
)


def innermost(error: BaseException) -> Iterator[FrameType]:
    """Frames of an error and of its causes, the innermost frame of the first cause first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in reversed(chain):
        frames = [frame for frame, _ in traceback.walk_tb(link.__traceback__)]
        yield from reversed(frames)


def failing_node(error: BaseException) -> torch.fx.Node | None:
    """The FX node that was being processed when the error came up, or None.

    torch raises from deep inside a loop over nodes, and gives the node in prose only; the loop's frame has it.
    """
    for frame in innermost(error):
        for name in ("node", "n"):
            candidate = frame.f_locals.get(name)
            if isinstance(candidate, torch.fx.Node) and candidate.op == "call_function":
                return candidate
    return None


def source_line(file: str, line: int) -> str:
    """`file:line: source text` of one line of Python."""
    text = linecache.getline(file, line).strip()
    return f"{file}:{line}: {text}" if text else f"{file}:{line}"


def _is_machinery(file: str) -> bool:
    return file.startswith(_MACHINERY) or any(name in file for name in _MACHINERY_NAMES)


def line_of_node(node: torch.fx.Node) -> str | None:
    """The line of the user's model that made an FX node, from the stack trace that torch.export recorded."""
    trace = node.meta.get("stack_trace") or node.stack_trace
    if not trace:
        return None
    calls = [(m["file"], int(m["line"])) for m in _TRACE_LINE.finditer(trace)]
    user_calls = [call for call in calls if not _is_machinery(call[0])]
    return source_line(*(user_calls or calls)[-1]) if calls else None


def line_of_error(error: BaseException) -> str | None:
    """The line of the user's model where an error came up: of the failing FX node, else the innermost user frame."""
    node = failing_node(error)
    if node is not None and (line := line_of_node(node)) is not None:
        return line
    # The stack text inside torch's message names the line of the model, when the frames are torch's own.
    for frame in innermost(error):
        if not _is_machinery(frame.f_code.co_filename) and frame.f_code.co_name != "<module>":
            line_number = next((no for f, no in _walk(error) if f is frame), frame.f_lineno)
            return source_line(frame.f_code.co_filename, line_number)
    return None


def _walk(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield from traceback.walk_tb(current.__traceback__)
        current = current.__cause__ or current.__context__


def first_cause(error: BaseException) -> BaseException:
    """The error that started a chain of `raise ... from`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def capture_error(what: str, error: BaseException, inputs: Sequence[str] = ()) -> CaptureError:
    """A CaptureError that says what failed, at which line of the user's model, and what to try.

    Args:
        what: What failed.
        error: Why.
        inputs: Names of the inputs, which torch knows by number only.
    """
    cause = first_cause(error)
    reason = str(cause).strip().split("\n\n")[0].strip() or type(cause).__name__
    reason = _INPUT.sub(lambda m: inputs[int(m[1])] if int(m[1]) < len(inputs) else m[0], reason)
    text = f"{type(cause).__name__}: {reason}"
    full = f"{type(cause).__name__} {cause}"
    hint = next((advice for pattern, advice in _HINTS if re.search(pattern, full)), None)
    default = "call the module eagerly with these inputs first; if that works, rewrite this line with tensor operations"
    return CaptureError(f"{what}: {text}", where=line_of_error(error) or (), hint=hint or default)
