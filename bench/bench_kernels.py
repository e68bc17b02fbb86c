"""Every fused operation at the shapes of the real networks: pytest bench/bench_kernels.py --benchmark-only

Ids say network, operation, shapes, precision, pass (forward, or forward and backward) and implementation:
reference, compiled (the reference through Inductor), triton. `extra_info` has the bytes that have to be moved
(every operand read once, every result written once), the floating point operations, both as rates, and the
rates' fractions of what this device was measured to reach in copying and in a matrix product.
"""

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgan.config import make_config, resolve_device
from fastgan.kernels import dispatch
from fastgan.operations import NETWORKS, Call, calls

CONFIG, DEVICE = resolve_device(make_config("dcgan"))
NETWORKS_HERE = [n for n in NETWORKS if DEVICE.type == "cuda" or n not in ("stylegan256", "stylegan1024")]


def largest(found: list[Call]) -> list[Call]:
    """Of each operation, the call that moves most."""
    return list({call.op.name: call for call in sorted(found, key=lambda call: size(call.args))}.values())


def cases() -> Iterator:
    """On a CPU, where Inductor starts a compiler for each, only an operation's largest call in a network;
    compiled, if it has a backward pass, only together with that."""
    for network in NETWORKS_HERE:
        small = network.startswith("smoke")
        found = list(calls(network))
        for call in found if small or DEVICE.type == "cuda" else largest(found):
            differentiable = any(isinstance(a, Tensor) and a.requires_grad for a in call.args)
            implementations = ["compiled", *call.op.candidates]
            if DEVICE.type != "cuda":  # bench/conftest.py says so
                implementations = ["compiled", "reference"]
            if small:
                implementations.remove("compiled")
            for backward in (False, True) if differentiable else (False,):
                for impl in implementations:
                    if impl == "compiled" and DEVICE.type != "cuda" and differentiable and not backward:
                        continue
                    step = "forward-backward" if backward else "forward"
                    name = f"{network}-{call.name}-{CONFIG.precision}-{step}-{impl}"
                    yield pytest.param(call, backward, impl, id=name)


@functools.cache
def copy_rate() -> float:
    """Bytes a second of a copy too large for any cache, read and write counted."""
    x = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / dispatch.seconds(lambda: y.copy_(x), DEVICE)


@functools.cache
def matrix_rate() -> float:
    """Floating point operations a second of a matrix product in the networks' precision."""
    n = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=DEVICE).to(CONFIG.dtype) for _ in range(2))
    return 2 * n**3 / dispatch.seconds(lambda: a @ b, DEVICE)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


@pytest.mark.parametrize(("call", "backward", "impl"), list(cases()))
def test_operation(benchmark, call: Call, backward: bool, impl: str):
    args = call.tensors(DEVICE, CONFIG.dtype)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    function = call.op.candidates["reference" if impl == "compiled" else impl]
    if impl == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False, fullgraph=True)

    def first(result) -> Tensor:
        return result if isinstance(result, Tensor) else result[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return first(function(*args))

    with FlopCounterMode(display=False) as counter:
        y = first(call.op.candidates["reference"](*args))
        cotangent = torch.randn_like(y)
        if backward:
            torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
    moved = size(args) + size([y])
    if backward:  # once more with the cotangent, and a gradient for every leaf
        moved += size(args) + size([y]) + size(leaves)

    def run():
        if backward:
            torch.autograd.grad(first(function(*args)), leaves, cotangent, allow_unused=True)
        else:
            forward()
        dispatch._sync(DEVICE)

    run()
    benchmark.pedantic(run, rounds=3 if "smoke" in benchmark.name else 10, warmup_rounds=1)
    seconds, flops = benchmark.stats.stats.median, counter.get_total_flops()
    benchmark.extra_info.update(
        bytes_moved=moved,
        gb_per_second=round(moved / seconds / 1e9, 2),
        gflop_per_second=round(flops / seconds / 1e9, 1),
        fraction_of_copy=round(moved / seconds / copy_rate(), 3),
        fraction_of_matrix=round(flops / seconds / matrix_rate(), 3),
    )
    assert math.isfinite(y.float().sum().item())
