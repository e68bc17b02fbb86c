"""Samples in chunks of one size: sample i is a function of the seed, the network and i, whatever the count.

A library adds up the terms of a convolution or a matrix product in an order that may depend on the batch, so
the same latent can give another last bit in another batch. Therefore all chunks have one size, and the last
is filled up; then the bits are the same on one kind of device with one number of threads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.compiled import CudaCapture, Phase, Recordings
from fastgan.engine import one_hot

# Pixels of a chunk, and the most images: from there on a larger one is no faster (CPU: measured).
CHUNK = {"cpu": (2**17, 32), "cuda": (2**22, 64)}
NOISES = ("const", "none", "random")


def chunk_size(resolution: int, device: torch.device) -> int:
    """Images computed at a time."""
    pixels, most = CHUNK[device.type]
    return max(1, min(most, pixels // resolution**2))


def latents(seed: int, count: int, z_dim: int, bound: float | None = None, first: int = 0) -> Tensor:
    """float32 [count, z_dim] from number `first` on, the i-th a function of (seed, i) alone.

    `bound` redraws every number beyond it, the truncation trick on z (Brock et al. 2018, section 3.1).
    """
    z = np.empty((count, z_dim), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, first + i])
        z[i] = rng.standard_normal(z_dim, np.float32)
        while bound is not None and (far := np.abs(z[i]) > bound).any():
            z[i, far] = rng.standard_normal(int(far.sum()), np.float32)
    return torch.from_numpy(z)


def noises(seed: int, count: int, size: int, first: int = 0) -> Tensor:
    """Unit normal float32 [count, size] for the layers that add noise, independent of `latents`."""
    rows = [
        np.random.default_rng([seed, i, 1]).standard_normal(size, np.float32)
        for i in range(first, first + count)
    ]
    return torch.from_numpy(np.stack(rows))


def labels(count: int, c_dim: int, label: int | None = None) -> np.ndarray | None:
    """int64 [count]: all `label`, or the classes in turn; None where there are none."""
    if c_dim == 0:
        return None
    return np.arange(count) % c_dim if label is None else np.full(count, label)


@dataclass(frozen=True)
class Plan:
    """What `count` samples are made of.

    z     latents [count, z_dim], or None: drawn from the seed
    c     labels int64 [count] or weights of the classes [count, c_dim]; None without classes
    noise of a StyleGAN: "const" (the network's own), "none" or "random" (drawn from the seed for each sample)

    `truncation` below 1 moves a StyleGAN's w towards its mean, on the first `cutoff` layers if that is given;
    for other networks it redraws the numbers of z beyond it.
    """

    count: int
    seed: int = 0
    truncation: float = 1.0
    cutoff: int | None = None
    noise: str = "const"
    z: np.ndarray | None = None
    c: np.ndarray | None = None


Finish = Callable[[Tensor], Tensor]  # what becomes of a chunk's images on the device; makes a new tensor


def samples(G: Any, plan: Plan, finish: Finish, **running: Any) -> Iterator[np.ndarray]:
    """`finish` of a LoadedGenerator's images [n, C, H, W], chunk by chunk; `running` as for `in_chunks`."""
    styled, device = G.styled, G.device
    bound = plan.truncation if plan.truncation < 1 and not styled else None
    options: dict[str, Any] = (
        {"truncation": plan.truncation, "truncation_cutoff": plan.cutoff} if styled else {}
    )
    if styled and plan.noise == "none":
        options["noise"] = "none"

    def inputs(first: int, count: int) -> tuple[Tensor | None, ...]:
        if plan.z is None:
            z = latents(plan.seed, count, G.z_dim, bound, first)
        else:
            z = torch.from_numpy(np.array(plan.z[first : first + count], np.float32).reshape(count, -1))
        c = noise = None
        if plan.c is not None:
            c = torch.from_numpy(plan.c[first : first + count])
            c = one_hot(c, G.c_dim) if c.ndim == 1 else c.float()
        if styled and plan.noise == "random":
            noise = noises(plan.seed, count, G.synthesis.noise_size, first)
        return z, c, noise

    run = partial(_generate, options=options)
    return in_chunks(
        G.net, run, plan.count, chunk_size(G.config.resolution, device), inputs, finish, **running
    )


def translations(
    G: Any, images: Tensor, to: str, finish: Callable[..., Tensor], **running: Any
) -> Iterator[np.ndarray]:
    """`finish(real, translated)` of images uint8 [N, C, R, R] and what a LoadedTranslator makes of them."""

    def inputs(first: int, count: int) -> tuple[Tensor]:
        return (images[first : first + count],)

    run = partial(_translate, to=to)
    size = chunk_size(G.config.resolution, G.device)
    return in_chunks(G.net, run, len(images), size, inputs, lambda pair: finish(*pair), **running)


def _generate(net: Any, z: Tensor, c: Tensor | None, noise: Tensor | None, options: dict[str, Any]) -> Tensor:
    return net(z, c, **options) if noise is None else net(z, c, noise=noise, **options)


def _translate(net: Any, images: Tensor, to: str) -> tuple[Tensor, Tensor]:
    real = images / 127.5 - 1
    return real, net.translate(real, to)


def in_chunks(
    net: torch.nn.Module,
    run: Callable[..., Any],
    count: int,
    size: int,
    inputs: Callable[[int, int], tuple[Tensor | None, ...]],
    finish: Callable[[Any], Tensor],
    compile: bool = False,
    ahead: int = 0,
    announce: Callable[[str], None] = lambda message: None,
) -> Iterator[np.ndarray]:
    """finish(run(net, *inputs(first, n))) for samples first .. first + n - 1, `size` at a time, in order.

    The device works on up to `ahead` samples more than have been asked for. `compile` makes one graph of
    `run`, which `announce` is told of; on CUDA, `run` is replayed as a CUDA graph in any case.
    """
    device = next(net.parameters()).device
    recordings = Recordings(CudaCapture(device)) if device.type == "cuda" else None
    phase = Phase("the generator", run, device, compile, recordings=recordings, announce=announce)

    @torch.inference_mode()
    def launch(first: int) -> Callable[[], np.ndarray]:
        n = min(size, count - first)
        filled = [None if x is None else _filled(x, size).to(device) for x in inputs(first, n)]
        return _fetch(finish(phase(0, net, *filled))[:n])

    waiting: deque[Callable[[], np.ndarray]] = deque()
    for first in range(0, count, size):
        waiting.append(launch(first))
        if len(waiting) * size > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _filled(x: Tensor, size: int) -> Tensor:
    """x with its last row repeated until there are `size`, in new memory of one layout."""
    form = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    whole = torch.empty((size, *x.shape[1:]), dtype=x.dtype, memory_format=form)
    whole[: len(x)] = x
    whole[len(x) :] = x[-1]
    return whole


def _fetch(x: Tensor) -> Callable[[], np.ndarray]:
    """Start copying x to the host; what waits for it, and for nothing launched later, is returned."""
    if not x.is_cuda:
        return x.numpy
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait
