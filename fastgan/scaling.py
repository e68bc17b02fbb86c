"""What a run on several GPUs that are not here would gain: `profile --estimate DEVICE --gpus N`.

The batch is shared out, so a GPU's step is estimate.py's for its part of it; behind every phase the gradients
go once round a ring of all GPUs, in fp32 and overlapped with nothing:

    seconds = 2 (N - 1) / N * bytes / link + 2 (N - 1) * latency

The link is the slowest in the ring: that between the GPUs of a machine as long as one machine is enough, then
that between machines, which all GPUs of a machine share.
"""

import dataclasses
from typing import Any, NamedTuple

import torch

from fastgan.config import Config, UsageError, build_networks
from fastgan.distributed import check_shares
from fastgan.estimate import DEVICES, Device, step

MACHINE = 8  # GPUs in one
NETWORKS = (10, 100, 400)  # Gbit/s between machines: Ethernet, fast Ethernet adapters, InfiniBand NDR
LATENCY, NETWORK_LATENCY = 5e-6, 30e-6  # seconds of a hop, assumed


class Row(NamedTuple):
    """One number of GPUs and one link; every figure is an estimate, times in seconds."""

    gpus: int
    images: int  # of an update on each GPU
    link: str
    reduce: float  # a step's all-reduces
    low: float  # a step: products alone, at peak
    high: float  # nothing fused
    speed_up: tuple[float, float]  # over one GPU, at low and high


def gradient_bytes(config: Config) -> tuple[int, int]:
    """Bytes that a step's all-reduces have to average, and how many all-reduces there are."""
    with torch.device("meta"):
        networks = build_networks(config)
    g, d = (sum(p.nbytes for p in net.parameters()) for net in networks)
    return config.d_steps * d + config.g_steps * g, config.d_steps + config.g_steps


def ring_seconds(gpus: int, size: float, reductions: int, bandwidth: float, latency: float) -> float:
    """Of `reductions` all-reduces of `size` bytes together, at `bandwidth` bytes/s in each direction."""
    return 2 * (gpus - 1) / gpus * size / bandwidth + reductions * 2 * (gpus - 1) * latency


def links(gpus: int, device: Device) -> list[tuple[str, float, float]]:
    """(name, bytes/s, latency) of what N GPUs could be joined by."""
    if gpus <= MACHINE:
        return [(f"{device.link:g} GB/s", device.link * 1e9, LATENCY)]
    return [(f"{gbit} Gbit/s", gbit / 8 * 1e9, NETWORK_LATENCY) for gbit in NETWORKS]


def scaling(config: Config, device: Device, most: int) -> list[Row]:
    """For 1, 2, 4, ... `most` GPUs, as far as the batch can be shared out."""
    size, reductions = gradient_bytes(config)
    rows: list[Row] = []
    gpus = 1
    while gpus <= most:
        try:
            if gpus > 1:
                check_shares(config, gpus)
        except UsageError:
            break
        share = config.batch // gpus
        each = step(dataclasses.replace(config, batch=share), device)
        for name, bandwidth, latency in links(gpus, device) if gpus > 1 else [("", 1.0, 0.0)]:
            reduce = ring_seconds(gpus, size, reductions, bandwidth, latency)
            low, high = each.seconds_at_least + reduce, each.seconds_unfused + reduce
            one = rows[0] if rows else None
            speed_up = (one.low / low, one.high / high) if one else (1.0, 1.0)
            rows.append(Row(gpus, share, name, reduce, low, high, speed_up))
        gpus *= 2
    return rows


def second_machine(config: Config, rows: list[Row]) -> tuple[float, float] | None:
    """Gbit/s between two machines from which both are faster than one, if a step takes `low` or `high`.

    None where the rows do not reach that far; infinite where a GPU has too little to do for it ever to pay.
    """
    size, reductions = gradient_bytes(config)
    one = next((row for row in rows if row.gpus == MACHINE), None)
    two = next((row for row in rows if row.gpus == 2 * MACHINE), None)
    if one is None or two is None:
        return None
    hops = ring_seconds(two.gpus, 0, reductions, 1.0, NETWORK_LATENCY)
    moved = ring_seconds(two.gpus, size, 0, 1.0, 0.0)  # bytes
    low, high = (
        moved / spare * 8 / 1e9 if (spare := before - (after - two.reduce) - hops) > 0 else float("inf")
        for before, after in ((one.low, two.low), (one.high, two.high))
    )
    return low, high


def report(config: Config, name: str, most: int) -> tuple[list[str], dict[str, Any]]:
    """(lines to print, figures) of up to `most` devices of that name in DEVICES."""
    size, reductions = gradient_bytes(config)
    rows = scaling(config, DEVICES[name], most)
    lines = [
        f"estimate: --batch {config.batch} shared out; {size / 1e6:.1f} MB of gradients a step "
        f"in {reductions} all-reduces",
        "estimate: GPUs  images each          link  all-reduce           step, ms      speed-up",
    ]
    for row in rows:
        span = f"{1000 * row.low:.3g} to {1000 * row.high:.3g}"
        gain = "{:.2f} to {:.2f}".format(*sorted(row.speed_up))
        lines.append(
            f"estimate: {row.gpus:4}  {row.images:11}  {row.link:>12}  {1000 * row.reduce:7.3f} ms  "
            f"{span:>17}  {gain:>12}"
        )
    if rows[-1].gpus * 2 <= most:
        lines.append(f"estimate: more GPUs would need a --batch above {config.batch}")
    figures: dict[str, Any] = {"gradient_bytes": size, "rows": [row._asdict() for row in rows]}
    if pays := second_machine(config, rows):
        slow, fast = sorted(pays)
        figures["second_machine_gbits"] = [slow, fast]
        lines.append(
            f"estimate: a second machine of {MACHINE} pays from {slow:.3g} to {fast:.3g} Gbit/s between them"
        )
    return lines, figures
