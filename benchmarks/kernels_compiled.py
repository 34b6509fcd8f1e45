"""What the compilers for NVIDIA GPUs say of the Triton kernels, without a GPU.

    python benchmarks/kernels_compiled.py --json [--arch 80 90 100] [--only REGEX] [--out FILE]

Triton's wheels bring the whole way to machine code (ptxas, cuobjdump). Every kernel is launched as the backend does,
with real tensors on the CPU, and in place of a launch each of its configurations is compiled for each architecture with
what Triton specializes on there: dtypes, alignment, sizes that 16 divides. Whether a kernel is right is a question for
the interpreter (tests/backends/test_torch_kernels.py), how fast it is one for a GPU (benchmarks/gpu.py). In between lie
failures that neither an interpreter nor a machine without a GPU shows, and what decides about bandwidth:

    registers, spilled_bytes    of a thread; spilled ones go to memory
    load_bytes, store_bytes     the narrowest access of a thread to global memory; 16 is the widest before sm_100
    resident_warps              of a multiprocessor, by registers, threads, programs and shared memory (CUDA C++
                                Programming Guide, "Compute Capabilities"): what hides the latency of memory

Figures of the last line:

    compiled    programs: kernel, case, dtype, architecture, configuration
    failed      {program: reason}
    spilled     programs that spill
    poor        cases whose rows are aligned, and none of whose configurations has 16-byte accesses without spilling
    best        {kernel: {case: its widest configuration with most warps, bfloat16 on sm_90}}

Exit code 0 if nothing failed and nothing is poor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TOKENS = 6
# of a multiprocessor
REGISTERS = 65536  # a quarter for each of its four schedulers
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB
Line = dict[str, Any]


class Driver:
    """Stands for Triton's driver: a device of the architecture to compile for."""

    arch = 90

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device."""
        return self.arch

    def get_current_stream(self, _: int) -> int:
        """Nothing is launched on it."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.arch, 32)


def calls(dtype: torch.dtype) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Arguments by kernel and case: shapes of ViT-B, BERT, Llama, and one that nothing divides."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def norm(columns: int, is_rms: bool) -> tuple[Any, ...]:
        x, vector = zeros(TOKENS, columns), zeros(columns)
        return x, x, vector, None if is_rms else vector, 1e-5, is_rms

    def rotary(heads: int, key_heads: int, size: int, interleaved: bool = False) -> tuple[Any, ...]:
        packed = zeros(1, TOKENS, heads + key_heads, size).transpose(1, 2)
        table = zeros(1, TOKENS, size // 2)
        return packed[:, :heads], packed[:, heads:], table, table, interleaved

    return {
        "residual_norm": {
            "layer 768": norm(768, False), "layer 4096": norm(4096, False), "rms 2048": norm(2048, True),
            "rms 4096": norm(4096, True), "odd 197": norm(197, False),
        },
        "gated_unit": {
            "silu 8192": (zeros(TOKENS, 8192), zeros(TOKENS, 8192), "silu"),
            "gelu packed 2816": (*zeros(TOKENS, 5632).split(2816, -1), "gelu_tanh"),
            "odd 197": (zeros(TOKENS, 197), zeros(TOKENS, 197), "gelu"),
        },
        "bias_activation": {
            "gelu 3072": (zeros(TOKENS, 3072), zeros(3072), "gelu"), "odd 197": (zeros(TOKENS, 197), zeros(197), "silu")
        },
        "rotary_qk": {
            "32 and 8 heads of 64": rotary(32, 8, 64), "32 and 32 heads of 128": rotary(32, 32, 128),
            "odd interleaved": rotary(3, 1, 62, True),
        },
    }  # fmt: skip


def used(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory, as cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", told)}


def widths(ptx: str, access: str) -> list[int]:
    """Bytes of each access ("ld" or "st") of a thread to global memory, in the order of the text."""
    found = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\s", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def facts(program: Any, arch: int, warps: int) -> Line:
    """What the machine code of one program needs, and what a multiprocessor can hold of it."""
    needs, loads = used(program.asm["cubin"]), widths(program.asm["ptx"], "ld")
    # registers are given out to warps, 256 at a time
    by_registers = 4 * (REGISTERS // 4 // (-(-needs["REG"] * 32 // 256) * 256)) // warps
    by_shared = SHARED[arch] * 1024 // max(needs["SHARED"], 1)
    resident = min(by_registers, WARPS[arch] // warps, by_shared, PROGRAMS[arch])
    return {
        "registers": needs["REG"],
        "spilled_bytes": needs["STACK"],
        "load_bytes": min(loads),
        "store_bytes": min(widths(program.asm["ptx"], "st")),
        "resident_warps": resident * warps,
    }


def compiled(kernel: Any, values: tuple[Any, ...], arch: int) -> Iterator[Line]:
    """A line for each configuration in which the kernel can be launched on these arguments."""
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    tuner = kernel.tuner
    with mock.patch.object(tuner, "run", lambda *args, **options: launches.append((args, options))):
        kernel.op(*values)
    ((arguments, options),) = launches
    options["warmup"] = True
    for configuration in tuner.configs:
        line = {"configuration": {**configuration.kwargs, "warps": configuration.num_warps}}
        try:
            program = tuner.fn.run(*arguments, **options, **configuration.all_kwargs())
        except Exception as failure:  # whatever the compilers raise; all others are compiled nevertheless
            yield line | {"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
            continue
        yield line | facts(program, arch, configuration.num_warps)


def widest(lines: list[Line]) -> Line:
    """The one with the widest accesses, and of those the one with most warps."""
    return max(lines, key=lambda line: (min(line["load_bytes"], line["store_bytes"]), line["resident_warps"]))


def figures(lines: list[Line]) -> dict[str, Any]:
    """What the last line says."""
    good = [line for line in lines if "failed" not in line]
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in good:
        groups.setdefault((line["kernel"], line["case"], line["dtype"], line["arch"]), []).append(line)
    poor = []
    best: dict[str, dict[str, Line]] = {}
    for (kernel, case, dtype, arch), found in groups.items():
        whole = [line for line in found if not line["spilled_bytes"]]
        wide = [line for line in whole if min(line["load_bytes"], line["store_bytes"]) >= 16]
        if not wide and "odd" not in case:
            poor.append(f"{kernel}, {case}, {dtype}, sm_{arch}")
        if whole and (dtype, arch) == ("bfloat16", 90):
            shown = {k: v for k, v in widest(whole).items() if k not in ("kernel", "case", "dtype", "arch")}
            best.setdefault(kernel, {})[case] = shown
    return {
        "compiled": len(good),
        "failed": {named(line): line["failed"] for line in lines if "failed" in line},
        "spilled": [named(line) for line in good if line["spilled_bytes"]],
        "poor": poor,
        "best": best,
    }


def named(line: Line) -> str:
    """One program in words."""
    return f"{line['kernel']}, {line['case']}, {line['dtype']}, sm_{line['arch']}, {line['configuration']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(WARPS), default=[80, 90, 100], metavar="ARCH")
    parser.add_argument("--only", default="", help="only `kernel, case, dtype` that match this regular expression")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines: every program")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled: run it without")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):  # declared as a machine with a GPU does
        from xform.backends.torch_triton.kernels import kernels

        tuned = {name: kernel for name, kernel in kernels().items() if kernel.tuner is not None}
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    start = time.monotonic()
    lines: list[Line] = []
    for dtype in DTYPES:
        for name, cases in calls(dtype).items():
            for case, values in cases.items():
                told = {"kernel": name, "case": case, "dtype": str(dtype).removeprefix("torch.")}
                if not re.search(arguments.only, ", ".join(told.values())):
                    continue
                for arch in arguments.arch:
                    driver.arch = arch
                    here = [told | {"arch": arch} | line for line in compiled(tuned[name], values, arch)]
                    lines += here
                    print(f"{', '.join(told.values())}, sm_{arch}: {len(here)} configurations", file=sys.stderr)
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    found = {"versions": versions, **figures(lines), "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(found) if arguments.json else found)
    return 1 if found["failed"] or found["poor"] or not lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
