"""What a step would take on a device that is not here: a roofline over the operations of its phases.

The phases run on the meta device. An operation takes the longer of FLOPs / peak and bytes / bandwidth, its
bytes being every operand read once and every result written once; views are free. Two bounds follow: the
convolutions and matrix products alone, as if all else were hidden, and every operation apart, as if nothing
were fused. Datasheet peaks are not reached in practice, so expect a step to take longer than the first.
"""

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgan.config import Config, batch_unit
from fastgan.engine import Engine
from fastgan.limit import grown, phase_calls, random_images


class Device(NamedTuple):
    """Dense peaks in TFLOP/s (fp32 products run as TF32), bandwidth in GB/s, memory in GB; `link` in GB/s a
    direction, between the GPUs of a machine (NVLink, Infinity Fabric, or PCIe where there is neither)."""

    bf16: float
    tf32: float
    bandwidth: float
    memory: float
    source: str
    link: float = 32


DEVICES = {
    "a100": Device(312, 156, 2039, 80, "NVIDIA A100 datasheet, 80GB SXM", 300),
    "h100": Device(989.4, 494.7, 3350, 80, "NVIDIA H100 datasheet, SXM, without sparsity", 450),
    "h200": Device(989.4, 494.7, 4800, 141, "NVIDIA H200 datasheet, SXM, without sparsity", 450),
    "b200": Device(2250, 1125, 8000, 180, "NVIDIA HGX B200 datasheet, an eighth, without sparsity", 900),
    "4090": Device(165.2, 82.6, 1008, 24, "NVIDIA Ada architecture whitepaper 2.0, appendix A", 32),
    "mi300x": Device(1307.4, 653.7, 5300, 192, "AMD Instinct MI300X datasheet", 448),
}
RESERVED = 1.5e9  # bytes that the driver's context, libraries and their workspaces take beside the tensors


class Meter(TorchDispatchMode):
    """Adds up what the operations under it would cost on `device`, and the bytes of tensors alive at once.

    `products` and `everything` are seconds, `flops` operations, `peak` bytes of results (arguments from
    outside are not counted).
    """

    def __init__(self, device: Device):
        super().__init__()
        self.device = device
        self.products = self.everything = 0.0
        self.flops = self.live = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        outputs = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = [o for o in outputs if o.untyped_storage()._cdata not in known]
        if not fresh and not func._schema.is_mutable:
            return out  # a view
        seconds = sum(map(_bytes, inputs + outputs)) / (self.device.bandwidth * 1e9)
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **(kwargs or {}), out_val=out)
            half = outputs[0].dtype in (torch.bfloat16, torch.float16)
            seconds = max(seconds, flops / (1e12 * (self.device.bf16 if half else self.device.tf32)))
            self.flops += flops
            self.products += seconds
        self.everything += seconds
        for o in fresh:
            self._keep(o.untyped_storage())
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: weakref.ref) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _bytes(x: Tensor) -> int:
    """What has to be moved of x: an expanded tensor is no larger than its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Estimate(NamedTuple):
    """Of a training step, penalties at their shares; every field is an estimate."""

    flops: float
    seconds_at_least: float  # convolutions and matrix products alone, and the optimizers
    seconds_unfused: float  # every operation apart
    peak_bytes: float
    largest_batch: int


def estimate(config: Config, device: Device) -> Estimate:
    """For `config` with a precision that is not auto."""
    at = step(config, device)
    return at._replace(largest_batch=_largest_batch(config, device.memory * 1e9, at.peak_bytes))


def batch_that_fits(config: Config, bytes: float) -> int:
    """The largest that `bytes` of memory hold; 0 if they do not hold the smallest."""
    return _largest_batch(config, bytes, peak_bytes(config))


def _largest_batch(config: Config, bytes: float, peak: float) -> int:
    """`peak` bytes are what the batch of `config` takes."""
    slope = (peak_bytes(dataclasses.replace(config, batch=2 * config.batch)) - peak) / config.batch
    return whole(int((bytes - peak) / slope) + config.batch, config)  # memory is a + slope * batch


def peak_bytes(config: Config) -> float:
    """Bytes that a run with this batch needs at once, estimated."""
    return step(config, DEVICES["a100"]).peak_bytes


def whole(batch: int, config: Config) -> int:
    """`batch`, rounded down to whole units."""
    return max(batch // batch_unit(config) * batch_unit(config), 0)


def step(config: Config, device: Device) -> Estimate:
    """`estimate` but for the largest batch, which is left at 0."""
    engine = grown(Engine(dataclasses.replace(config, compile=False), torch.device("cpu")))
    real = random_images(config, torch.device("meta"))
    g, d = (sum(p.nbytes for p in net.parameters()) for net in (engine.G, engine.D))
    # Adam reads p, g, m, v and writes p, m, v; the moving average reads two and writes one.
    update = (7 * (g + d) + 3 * g) / (device.bandwidth * 1e9)
    flops, at_least, unfused, peak = 0.0, update, update, 0
    for call in phase_calls(engine, real):
        run = call.on_meta()
        with Meter(device) as meter:
            run()
        flops += call.share * meter.flops
        at_least += call.share * meter.products
        unfused += call.share * meter.everything
        peak = max(peak, meter.peak)
    held = 4 * g + 3 * d + max(g, d)  # weights, two moments, the average; the other network's gradients
    return Estimate(flops, at_least, unfused, RESERVED + held + peak, 0)


def report(config: Config, name: str) -> tuple[list[str], dict[str, Any]]:
    """(lines to print, figures) for the device of that name in DEVICES."""
    device = DEVICES[name]
    e = estimate(config, device)
    figures = {
        "device": name,
        "source": device.source,
        "gflop_per_image": e.flops / config.step_images / 1e9,
        "seconds_per_kimg_at_least": 1000 * e.seconds_at_least / config.step_images,
        "seconds_per_kimg_unfused": 1000 * e.seconds_unfused / config.step_images,
        "peak_memory_gib": e.peak_bytes / 2**30,
        "largest_batch": e.largest_batch,
    }
    low, high = 1000 * e.seconds_at_least, 1000 * e.seconds_unfused
    lines = [
        f"{name} ({device.source}); every figure is an estimate",
        f"estimate: arithmetic       {figures['gflop_per_image']:.3g} GFLOP an image",
        f"estimate: step             {low:.3g} ms (products alone, at peak) to {high:.3g} ms (nothing fused)",
        f"estimate: speed            {figures['seconds_per_kimg_at_least']:.3g} to "
        f"{figures['seconds_per_kimg_unfused']:.3g} s/kimg",
        f"estimate: peak memory      {figures['peak_memory_gib']:.2f} GiB of {device.memory:g} GB",
        f"estimate: largest batch    {e.largest_batch}",
    ]
    return lines, figures
