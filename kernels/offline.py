"""Compile every kernel in every configuration for GPUs that are not here, and read the machine code.

    python -m fastgan.kernels.offline [--arch sm_90 ...] [--op bias_act ...] [--json]

Registers, stack (what spills) and shared memory against the limit come from the machine code; 128-bit loads
and matrix instructions from the assembly it is made of (PTX, whose vector loads and matrix products the
assembler keeps as they are, and AMD's own); bytes per result from the loads and stores of the compiler's
intermediate form, a loop's body counted once. Exit status 1 when a kernel does not compile, spills or asks
for too much shared memory.
"""

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fastgan.kernels.dispatch import REGISTERS, Build, interpreting

SHARED_LIMIT = {  # bytes that one block may use
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
OPS = (
    "bias_act",
    "upfirdn2d",
    "minibatch_stddev",
    "norm_act",
    "pixel_norm",
    "modulated_conv2d",
    "conv2d_resample",
    "conv_transpose_bn_act",
)
LOAD = re.compile(r"\b(?:ld\.global|cp\.async\.c|cp\.async\.bulk\.tensor|global_load|buffer_load)\S*( .*)?")
WIDE_LOAD = re.compile(
    r"ld\.global\S*\.v4\.[bf]32|ld\.global\S*\.v2\.[bf]64|cp\.async\.c\S* .*, (?:0x10|16)\b"
    r"|cp\.async\.bulk\.tensor|_load_dwordx4"
)
MATRIX = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "tcgen05", "v_mfma": "MFMA"}
ACCESS = re.compile(r"= tt\.load .*: (.*?)(?: loc|$)|tt\.store .*: (.*?)(?: loc|$)")
TENSOR = re.compile(r"(?:tensor<([\dx]+)x)?!tt\.ptr<\w*?(\d+)(?:,[^>]*)?>")


@dataclasses.dataclass
class Result:
    """What one kernel in one configuration became on one GPU."""

    op: str
    name: str
    arch: str
    error: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    loads: int = 0
    wide_loads: int = 0
    matrix: str = ""
    bytes_per_element: float = 0.0
    least_bytes: float = 0.0

    @property
    def good(self) -> bool:
        """Compiled, without spills, within the limit of shared memory."""
        return not (self.error or self.spills or self.shared > self.shared_limit)


def builds(op: str) -> list[Build]:
    """What the file of `op` lists in OFFLINE; nothing when there is no such file or no list yet."""
    try:
        module = importlib.import_module(f"fastgan.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != f"fastgan.kernels.{op}":
            raise
        return []
    return list(getattr(module, "OFFLINE", []))


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def _compile(build: Build, arch: str) -> Any:
    import triton
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    missing = [n for n in names if n not in build.signature and n not in build.constexprs]
    unknown = [n for n in (*build.signature, *build.constexprs) if n not in names]
    if missing or unknown:
        raise ValueError(f"{build.name}: arguments missing {missing}, unknown {unknown}")
    signature = {n: build.signature.get(n, "constexpr") for n in names}
    aligned = [i for i, n in enumerate(names) if n in build.signature and n not in build.unaligned]
    aligned = [i for i in aligned if not signature[names[i]].startswith("fp")]
    source = ASTSource(
        build.kernel, signature, build.constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if arch.startswith("sm_1"):
        options["maxnreg"] = REGISTERS
    return triton.compile(source, target=_target(arch), options=options)


def _tool(name: str, *args: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def _machine_code(compiled: Any) -> tuple[str, int, int]:
    """Assembly text, registers a thread, bytes of stack a thread."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        usage = (
            re.search(r"\.private_segment_fixed_size:\s+(\d+)", text),
            re.search(r"\.vgpr_count:\s+(\d+)", text),
        )
        stack, registers = (int(match[1]) for match in usage if match)
        return text, registers, stack
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    assert usage
    return compiled.asm["ptx"], int(usage[1]), int(usage[2])


def _bytes(ttir: str) -> int:
    """Bytes that the loads and stores in the text move, each executed once."""
    total = 0
    for line in ttir.splitlines():
        for types in ACCESS.findall(line):
            for shape, bits in TENSOR.findall("".join(types))[:1]:
                total += math.prod(int(d) for d in shape.split("x") if d) * int(bits) // 8
    return total


def measure(op: str, build: Build, arch: str) -> Result:
    """Compile `build` for `arch` and read the machine code."""
    result = Result(op, build.name, arch, shared_limit=SHARED_LIMIT[arch], least_bytes=build.least)
    try:
        compiled = _compile(build, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        result.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return result
    text, result.registers, result.spills = _machine_code(compiled)
    result.shared = compiled.metadata.shared
    loads = [match.group() for match in LOAD.finditer(text)]
    result.loads, result.wide_loads = len(loads), sum(bool(WIDE_LOAD.search(load)) for load in loads)
    result.matrix = ",".join(name for word, name in MATRIX.items() if word in text)
    if build.elements:
        result.bytes_per_element = _bytes(compiled.asm["ttir"]) / build.elements
    return result


def _measure_one(work: tuple[str, int, str]) -> Result:
    op, i, arch = work
    return measure(op, builds(op)[i], arch)


def report(archs: list[str], ops: list[str], jobs: int = 1) -> list[Result]:
    """Every configuration of `ops` on `archs`. Raises RuntimeError under TRITON_INTERPRET."""
    if interpreting():
        raise RuntimeError("offline compilation needs a process without TRITON_INTERPRET=1")
    work = [(op, i, arch) for op in ops for i in range(len(builds(op))) for arch in archs]
    if jobs == 1 or len(work) < 8:
        return [_measure_one(w) for w in work]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_measure_one, work, chunksize=4))


def table(results: list[Result]) -> str:
    """The results, a line each."""
    width = max([len(r.name) for r in results], default=4)
    lines = [
        f"{'kernel':{width}} arch    regs  stack  shared/limit  128-bit/loads matrix  bytes/result (least)"
    ]
    for r in results:
        if r.error:
            lines.append(f"{r.name:{width}} {r.arch:7} {r.error}")
            continue
        lines.append(
            f"{r.name:{width}} {r.arch:7} {r.registers:4} {r.spills:6} {r.shared:6}/{r.shared_limit:<7}"
            f" {r.wide_loads:6}/{r.loads:<6} {r.matrix or '-':7}"
            f" {r.bytes_per_element:6.2f} ({r.least_bytes:g})"
        )
    return "\n".join(lines)


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgan.kernels.offline", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", choices=[*SHARED_LIMIT], default=[*SHARED_LIMIT], metavar="ARCH")
    parser.add_argument("--op", nargs="+", choices=OPS, default=[*OPS], metavar="OP")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile at once"
    )
    args = parser.parse_args()
    results = report(args.arch, args.op, args.jobs)
    print(json.dumps([dataclasses.asdict(r) for r in results], indent=1) if args.json else table(results))
    return 0 if all(r.good for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
