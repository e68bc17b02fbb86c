"""Pixel norm: each pixel's vector of channels scaled to a mean square of one (Karras et al. 2018, ProGAN).

    y = r x,   r = rsqrt(mean_c x^2 + eps)
    dx = r dy - r^3 x (x . dy) / C

The gradient is linear in dy, so its derivative by dy is the same expression of the cotangent v; along x it is

    -r^3 / C * (x (v . dy - 3 r^2 (x . dy) (x . v) / C) + (x . v) dy + (x . dy) v)

One kernel is all three passes: every channel of a pixel lies in one block, so each tensor is read once.
"""

from typing import Any

import torch
from torch import Tensor

from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl
from fastgan.kernels.memory import dense, is_channels_last, like, load, tile_offsets


@jit
def _pixel_norm_kernel(
    p_v,
    p_dy,
    p_x,
    p_out,
    p_dx,
    n_positions,
    n_channels,
    inner,
    EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out is y, or with dy its gradient, or with v as well that expression of v, and dx the derivative of
    <v, gradient> along x."""
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_c = tl.arange(0, BLOCK_C)
    m = (i_p < n_positions)[:, None] & (i_c < n_channels)[None, :]
    o = tile_offsets(i_p, i_c, n_channels, inner, CHANNELS_LAST, WIDE)
    x = load(p_x + o, m)
    r2 = 1 / (tl.sum(x * x, axis=1) / n_channels + EPS)
    r = tl.sqrt(r2)[:, None]
    k = (r2 / n_channels)[:, None]
    if p_dy is None:
        out = r * x
    else:
        dy = load(p_dy + o, m)
        a = tl.sum(x * dy, axis=1)[:, None]
        if p_v is None:
            out = r * (dy - k * a * x)
        else:
            v = load(p_v + o, m)
            b = tl.sum(x * v, axis=1)[:, None]
            out = r * (v - k * b * x)
            d = tl.sum(v * dy, axis=1)[:, None]
            tl.store(p_dx + o, -r * k * (x * (d - 3 * k * a * b) + b * dy + a * v), mask=m)
    tl.store(p_out + o, out, mask=m)


MOST_CHANNELS = 2048  # the kernel holds all channels of a pixel


def _pass(v: Tensor | None, dy: Tensor | None, x: Tensor, eps: float, outputs: int) -> list[Tensor]:
    x = dense(x)
    out = [torch.empty_like(x) for _ in range(outputs)]
    if x.numel() == 0:
        return out
    dy, v = (None if t is None else like(t, x) for t in (dy, v))
    channels = x.shape[1]
    inner = x.numel() // (x.shape[0] * channels)
    block_c = 1 << (channels - 1).bit_length()
    block_p = max(1, 4096 // block_c)
    with torch.cuda.device_of(x):
        _pixel_norm_kernel[(-(-x.numel() // (channels * block_p)),)](
            v,
            dy,
            x,
            out[0],
            out[-1],
            x.numel() // channels,
            channels,
            inner,
            EPS=eps,
            CHANNELS_LAST=is_channels_last(x) or inner == 1,
            WIDE=x.numel() >= 2**31,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **capped(x.device),
        )
    return out


@torch.library.custom_op("fastgan::pixel_norm", mutates_args=())
def _pixel_norm(x: Tensor, eps: float) -> Tensor:
    return _pass(None, None, x, eps, 1)[0]


@_pixel_norm.register_fake
def _(x, eps):
    return torch.empty_like(dense(x))


@torch.library.custom_op("fastgan::pixel_norm_backward", mutates_args=())
def _pixel_norm_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return _pass(None, dy, x, eps, 1)[0]


@_pixel_norm_backward.register_fake
def _(dy, x, eps):
    return torch.empty_like(dense(x))


@torch.library.custom_op("fastgan::pixel_norm_double_backward", mutates_args=())
def _pixel_norm_double_backward(v: Tensor, dy: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """d dy and d x of <v, dx>."""
    ddy, dx = _pass(v, dy, x, eps, 2)
    return ddy, dx


@_pixel_norm_double_backward.register_fake
def _(v, dy, x, eps):
    return torch.empty_like(dense(x)), torch.empty_like(dense(x))


def _setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


_pixel_norm.register_autograd(
    lambda ctx, dy: (_pixel_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None),
    setup_context=_setup,
)
_pixel_norm_backward.register_autograd(
    lambda ctx, v: (*_pixel_norm_double_backward(v, *ctx.saved_tensors, ctx.eps), None),
    setup_context=_setup,
)


def pixel_norm_ref(x: Tensor, eps: float) -> Tensor:
    """The reference of `pixel_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(dim=1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    size, channels, channels_last = key
    pixels = 7 if small else max(2 ** (size - 1) // channels, 1)
    x = torch.randn(1, channels, 1, pixels, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return x.requires_grad_(), 1e-8


PIXEL_NORM = Op("pixel_norm", {"triton": _pixel_norm, "reference": pixel_norm_ref}, _sample)


def pixel_norm(x: Tensor, eps: float = 1e-8, *, impl: str | None = None) -> Tensor:
    """y = x / sqrt(mean_c x^2 + eps) for x [N, C, ...] (Karras et al. 2018, section 4.2), computed in fp32.

    Raises ValueError when x has no channel dimension.
    """
    check_tensors(x)
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...]: got shape {list(x.shape)}")
    if x.shape[1] > MOST_CHANNELS:
        return pixel_norm_ref(x, eps)

    def key():
        return bucket(x.numel()), x.shape[1], is_channels_last(x)

    return PIXEL_NORM(x, eps, key=key, impl=impl)


def _offline() -> list[Build]:
    builds = []
    for dtype, size, all_channels in (("bf16", 2, (64, 512)), ("fp32", 4, (512,))):
        for last in (False, True):
            for channels in all_channels:
                rows = max(1, 4096 // channels)
                meta = {
                    "EPS": 1e-8,
                    "CHANNELS_LAST": last,
                    "WIDE": False,
                    "BLOCK_P": rows,
                    "BLOCK_C": channels,
                }
                sizes = dict.fromkeys(("n_positions", "n_channels", "inner"), "i32")
                for passes, present in ((2, ()), (3, ("p_dy",)), (5, ("p_v", "p_dy"))):
                    absent = [n for n in ("p_v", "p_dy") if n not in present]
                    name = f"pixel_norm order {len(present)} {dtype} {'nhwc' if last else 'nchw'} {channels}"
                    builds.append(
                        Build(
                            name,
                            _pixel_norm_kernel,
                            {**dict.fromkeys((*present, "p_x", "p_out", "p_dx"), f"*{dtype}"), **sizes},
                            {**meta, **dict.fromkeys(absent, None)},
                            elements=rows * channels,
                            least=passes * size,
                        )
                    )
    return builds


OFFLINE = _offline()
