"""fastgan doctor: what this machine is, and whether every operation computes what it should on it.

On a GPU each kernel is compared with its reference, to second order, on the shape classes that the networks
use, as dispatch does before it uses one. On a CPU kernels run as their references; these are compared with
themselves in float64. (Under TRITON_INTERPRET=1 a CPU compares the kernels too, which takes minutes.)
"""

import dataclasses
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fastgan import __version__, cli, nvml
from fastgan.config import make_config, resolve_device
from fastgan.kernels.dispatch import Op, cache_file, deviation, interpreting, versions
from fastgan.operations import calls

NETWORKS = ("stylegan64", "dcgan64", "stylegan1-64", "biggan32", "cyclegan128")
ROUNDINGS = 64  # of the result's own type: the norm of a reference's error over the norm of the result


@dataclasses.dataclass
class Finding:
    """`classes` shape classes of an operation were compared in `dtypes`; `problems` has a line for each
    difference."""

    name: str
    classes: int = 0
    dtypes: dict[str, None] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def environment(device: torch.device, precision: str) -> dict[str, str]:
    """What a report of a problem should say."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {device}"
        driver = nvml.driver(device)
    else:
        hardware, driver = "CPU", "none needed"
    variables = ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if _ours(k))
    inductor = cache_dir()
    return {
        "fastgan": f"{__version__}, commit {clone}" if (clone := commit()) else __version__,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(device).partition(", ")[2],
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "device": hardware,
        "driver": driver,
        "precision": precision,
        "threads": str(torch.get_num_threads()),
        "caches": f"{cache_file(device).parent}, {inductor}",
        "variables": variables or "none set",
    }


def commit() -> str:
    """Of the clone that fastgan runs from, "-dirty" if files differ from it; "" without a clone or git."""
    clone = Path(__file__).resolve().parents[1]
    if not (clone / ".git").exists():
        return ""
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _ours(variable: str) -> bool:
    return variable.startswith(("FASTGAN_", "TRITON_", "TORCHINDUCTOR_", "OMP_", "CUDA_", "PYTORCH_"))


def classes() -> Iterator[tuple[Op, Any]]:
    """The operations of the networks with one key for every different small sample that they verify with."""
    seen = set()
    for network in NETWORKS:
        for call in calls(network):
            sample = call.op.sample(torch.float32, torch.device("meta"), call.key, True)
            what = (call.op.name, *(_description(a) for a in sample))
            if what not in seen:
                seen.add(what)
                yield call.op, call.key


def _description(a: Any) -> Any:
    return (tuple(a.shape), a.stride(), a.requires_grad) if isinstance(a, Tensor) else str(a)


def examine(device: torch.device, precision: str) -> list[Finding]:
    """One finding for each operation, in fp32 and, where the device has it, bf16."""
    kernels = device.type == "cuda" or interpreting()
    dtypes = [torch.float32]
    if precision == "bf16" and not interpreting():  # the interpreter truncates bfloat16
        dtypes.append(torch.bfloat16)
    findings: dict[str, Finding] = {}
    for op, key in classes():
        finding = findings.setdefault(op.name, Finding(op.name))
        finding.classes += 1
        for dtype in dtypes:
            finding.dtypes[str(dtype).removeprefix("torch.")] = None
            if kernels:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # what they say is in the list
                    finding.problems += op.verify(dtype, device, key)[1]
            else:
                finding.problems += _verify_reference(op, dtype, device, key)
    return list(findings.values())


def _verify_reference(op: Op, dtype: torch.dtype, device: torch.device, key: Any) -> list[str]:
    worst = deviation(op.candidates["reference"], op.sample(dtype, device, key, True), op.order)
    if worst <= ROUNDINGS * torch.finfo(dtype).eps:
        return []
    return [f"reference {op.name} differs from float64 by {worst:.3g} for {dtype}, class {key}"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    p = cli.Parser(prog="fastgan doctor", description=__doc__, formatter_class=cli.Prose)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = p.parse_args(argv)
    config, device = resolve_device(make_config("stylegan", device=args.device))
    for name, value in environment(device, config.precision).items():
        print(f"{name:10} {value}")
    against = "the references" if device.type == "cuda" or interpreting() else "float64"
    if against == "float64":
        print("kernels    run as their references on a CPU")
    print(f"\noperations against {against}, values and derivatives to second order:")
    torch.manual_seed(0)
    start = time.perf_counter()
    findings = examine(device, config.precision)
    for f in findings:
        state = "WRONG" if f.problems else "right"
        print(f"  {f.name:18} {state}  {f.classes} shape classes, {', '.join(f.dtypes)}")
        for problem in f.problems:
            print(f"    {problem}")
    wrong = [f.name for f in findings if f.problems]
    seconds = time.perf_counter() - start
    if wrong:
        print(f"\nverdict: NOT GOOD: {', '.join(wrong)} wrong on this device ({seconds:.0f} s)")
        return 1
    print(f"\nverdict: good: {len(findings)} operations agree with {against} ({seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
