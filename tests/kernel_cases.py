"""Every elementwise operation on small inputs, as (candidate, reference, arguments): what the tests loop
over."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.kernels.bias_act import ACTIVATIONS, BIAS_ACT
from fastgan.kernels.minibatch_stddev import MINIBATCH_STDDEV
from fastgan.kernels.norm_act import NORM_ACT
from fastgan.kernels.pixel_norm import PIXEL_NORM
from fastgan.kernels.upfirdn2d import UPFIRDN2D

LAYOUTS = ("nchw", "nhwc", "strided")


class KernelCase(NamedTuple):
    name: str
    triton: Callable
    reference: Callable
    args: tuple


def image(n: int, c: int, h: int, w: int, layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random x [n, c, h, w] that requires grad; "strided" is a view that no kernel can walk as it lies."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w + 3, generator=generator, dtype=torch.float64).to(dtype)[..., 2 : w + 2]
    if layout == "nchw":
        x = x.contiguous()
    elif layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.detach().requires_grad_()


def vector(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def cases(n: int, c: int, h: int, w: int, layout: str, dtype: torch.dtype) -> Iterator[KernelCase]:
    """One case an operation and variant for x [n, c, h, w]."""

    def case(name: str, op: Any, *args: Any) -> KernelCase:
        return KernelCase(name, op.candidates["triton"], op.candidates["reference"], args)

    def x(seed: int = 0) -> Tensor:
        return image(n, c, h, w, layout, dtype, seed)

    for act, (alpha, gain) in ACTIVATIONS.items():
        yield case(f"bias_act {act}", BIAS_ACT, x(), vector(c, dtype=dtype), 1, act, alpha, gain, None)
    yield case("bias_act clamp", BIAS_ACT, x(), vector(c, dtype=dtype), 1, "lrelu", 0.2, 2.0, 0.7)
    yield case("bias_act swish clamp", BIAS_ACT, x(), None, 1, "swish", 0.0, 2.0, 0.7)
    yield case("bias_act dim 3", BIAS_ACT, x(), vector(w, dtype=dtype), 3, "relu", 0.0, 1.0, None)
    f = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) / 4
    taps = torch.rand(5, generator=torch.Generator().manual_seed(4))
    one, two = (1, 1), (2, 2)
    yield case("upfirdn2d up", UPFIRDN2D, x(), f, two, one, (2, 1, 2, 1), False, 4.0)
    yield case("upfirdn2d up odd", UPFIRDN2D, x(), f, two, one, (3, 2, 1, 4), True, 4.0)
    yield case("upfirdn2d down", UPFIRDN2D, x(), f, one, two, (3, 2, 1, 4), False, 1.0)
    yield case("upfirdn2d separable", UPFIRDN2D, x(), taps, (3, 2), (2, 1), (4, 4, 5, 3), False, 1.5)
    yield case("upfirdn2d crop", UPFIRDN2D, x(), f[:2, :3], (2, 3), one, (-1, 2, 2, -1), True, 1.0)
    yield case("upfirdn2d identity", UPFIRDN2D, x(), None, one, two, (1, 1, 1, 1), False, 2.0)
    if n:
        yield case("minibatch_stddev", MINIBATCH_STDDEV, x(), n, 1)
        yield case("minibatch_stddev pairs", MINIBATCH_STDDEV, x(), 1 + (n % 2 == 0), c)
    yield case("pixel_norm", PIXEL_NORM, x(), 1e-8)
    wide = torch.promote_types(dtype, torch.float32)
    running = (torch.linspace(-1, 1, c, dtype=wide), torch.linspace(0.5, 2, c, dtype=wide))
    per_channel = [vector(c, dtype=dtype, seed=s) for s in (5, 6)]
    per_sample = [vector(n, c, dtype=dtype, seed=s) for s in (7, 8)]
    none = (None, None)
    for name, affine, stats, mode, act, up in (
        ("batch", per_channel, none, "batch", "lrelu", 1),
        ("batch up", per_sample, none, "batch", "relu", 2),
        ("instance", none, none, "instance", "relu", 1),
        ("adain", per_sample, none, "instance", "linear", 1),
        ("eval up", per_channel, running, "eval", "lrelu", 2),
        ("batch tanh", per_channel, none, "batch", "tanh", 1),
    ):
        if mode == "eval" or h * w > 1:
            yield case(f"norm_act {name}", NORM_ACT, x(), *affine, *stats, mode, 0.1, 1e-5, act, 0.2, up)
