"""Modulated convolution (Karras et al. 2019, section 2.2, equations 1 to 3), with everything around it.

    y = act(d[n, o] * conv(x * s[n, i], w) + noise + b) * gain
    d[n, o] = rsqrt(sum_{i, k} (w[o, i, k] s[n, i])^2 + 1e-8)

Scaling the input and the output instead of the weights gives one dense convolution for the whole batch in
place of one group a sample; d needs only w summed over its taps, a small matrix product, and is kept in fp32.
The kernel scales the operands of that convolution as it loads them and does the rest on its way out. Behind
the library's convolution one elementwise pass does that rest, y = act(d * c + noise + b) * gain.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgan.kernels.bias_act import activation, bias_act, bias_act_ref
from fastgan.kernels.conv2d_resample import (
    check_activation,
    class_tensors,
    fir_ref,
    gemm_fits,
    gemm_resample,
    library_resample,
    output_size,
    shape_class,
)
from fastgan.kernels.conv_gemm import SLOPE_BELOW_ZERO, conv_builds, slope_at, weight_builds
from fastgan.kernels.dispatch import Build, Op, bucket, capped, check_tensors, jit, tl, tuned
from fastgan.kernels.memory import (
    FLAT_CONFIGS,
    dense,
    flat_channels,
    flat_offsets,
    group_of,
    is_channels_last,
    load,
)
from fastgan.kernels.upfirdn2d import Pair, parse_padding, upfirdn2d


def demodulation(weight: Tensor, styles: Tensor) -> Tensor:
    """d [N, Cout] = rsqrt(sum_i s[n, i]^2 * sum_k w[o, i, k]^2 + 1e-8), in fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w2 = weight.to(dtype).square().sum(dim=[2, 3])
    return (styles.to(dtype).square() @ w2.t() + 1e-8).rsqrt()


def _scale_conv_scale(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    f: Tensor | None,
    demodulate: bool,
    fir: Callable[..., Tensor],
) -> Tensor:
    x = x * styles.to(x.dtype)[:, :, None, None]
    x = library_resample(x, weight, f, up, down, padding, 1, up == 1, False, fir)
    if demodulate:
        x = x * demodulation(weight, styles).to(x.dtype)[:, :, None, None]
    if noise is not None:
        x = x + noise.to(x.dtype)
    return x


def modulated_conv2d_ref(
    x, weight, styles, noise, up, down, padding, f, demodulate, bias, act, alpha, gain, clamp
) -> Tensor:
    """The reference of `modulated_conv2d`."""
    x = _scale_conv_scale(x, weight, styles, noise, up, down, padding, f, demodulate, fir_ref)
    return bias_act_ref(x, bias, 1, act, alpha, gain, clamp)


@jit
def _epilogue_kernel(
    p_x,
    p_d,
    p_noise,
    p_b,
    p_y,
    n,
    n_channels,
    pixels,
    noise_n,
    ALPHA: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i_group, o = flat_offsets(BLOCK, GROUP)
    m, m_group = o < n - base, (i_group < n - base)[:, None]  # groups are in or out as a whole
    u = load(p_x + base + o, m)
    i_c = flat_channels(base, i_group, n_channels, pixels, GROUP, CHANNELS_LAST)
    i_n = ((base + i_group) // (n_channels * pixels))[:, None]
    if p_d is not None:
        u *= load(p_d + i_n * n_channels + i_c, m_group).to(u.dtype)
    if p_noise is not None:
        if CHANNELS_LAST:
            i_p = ((base + i_group) // n_channels % pixels)[:, None]
        else:
            i_p = ((base + i_group) % pixels)[:, None] + tl.arange(0, GROUP)[None, :]
        u += load(p_noise + i_n * noise_n + i_p, m_group).to(u.dtype)
    if p_b is not None:
        u += tl.load(p_b + i_c).to(u.dtype)
    y = activation(u, ALPHA, ACT) * GAIN
    if CLAMP is not None:
        limit = tl.zeros_like(y) + CLAMP
        y = tl.minimum(tl.maximum(y, -limit), limit)
    tl.store(p_y + base + o, y, mask=m)


@torch.library.custom_op("fastgan::modulated_epilogue", mutates_args=())
def _epilogue(
    x: Tensor,
    d: Tensor | None,
    noise: Tensor | None,
    b: Tensor | None,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """act(d[n, c] * x[n, c, i] + noise[n, i] + b[c]) in one pass; act linear, relu or lrelu, gain > 0."""
    x = dense(x)
    y = torch.empty_like(x)
    n, (channels, pixels) = x.numel(), (x.shape[1], x.shape[2] * x.shape[3])
    if n == 0:
        return y
    if noise is not None:
        noise = noise.expand(*noise.shape[:-2], *x.shape[2:]).reshape(-1, pixels).contiguous()
    last = is_channels_last(x)

    def launch(config: tuple[int, int]) -> None:
        block, warps = config
        _epilogue_kernel[(-(-n // block),)](
            x,
            None if d is None else d.contiguous(),
            noise,
            b,
            y,
            n,
            channels,
            pixels,
            pixels if noise is not None and len(noise) > 1 else 0,
            ALPHA=alpha,
            GAIN=gain,
            CLAMP=clamp,
            ACT=act,
            CHANNELS_LAST=last,
            GROUP=group_of(channels if last else pixels),
            BLOCK=block,
            num_warps=warps,
            **capped(x.device),
        )

    with torch.cuda.device_of(x):
        key = (x.dtype, act, bucket(n), last, d is None, noise is None)
        launch(tuned("modulated_epilogue", key, FLAT_CONFIGS, launch, x.device))
    return y


@_epilogue.register_fake
def _(x, d, noise, b, act, alpha, gain, clamp):
    return torch.empty_like(dense(x))


def _save(ctx, inputs, output):
    x, d, noise, b, act, alpha, gain, ctx.clamp = inputs
    ctx.slopes = gain, gain * (alpha if act == "lrelu" else SLOPE_BELOW_ZERO[act])
    ctx.like = noise, b
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, d, output)


def _backward(ctx, g):
    """Plain operations on the gradient of the activation, so that they are differentiated as they stand."""
    x, d, y = ctx.saved_tensors
    noise, b = ctx.like
    g = g * slope_at(y, *ctx.slopes, ctx.clamp).to(g.dtype)
    gx = g if d is None else g * d.to(g.dtype)[:, :, None, None]
    gd = None if x is None else (g * x).sum([2, 3], dtype=torch.promote_types(g.dtype, d.dtype)).to(d.dtype)
    gnoise = gb = None
    if noise is not None and ctx.needs_input_grad[2]:
        gnoise = g.sum(1, keepdim=True).sum_to_size(noise.shape).to(noise.dtype)
    if b is not None and ctx.needs_input_grad[3]:
        gb = g.sum([0, 2, 3]).to(b.dtype)
    return gx, gd, gnoise, gb, None, None, None, None


_epilogue.register_autograd(_backward, setup_context=_save)


def _library(
    x, weight, styles, noise, up, down, padding, f, demodulate, bias, act, alpha, gain, clamp
) -> Tensor:
    """The library's convolution; x * styles before it and all the rest behind it are a pass each."""
    x = x * styles.to(x.dtype)[:, :, None, None]
    x = library_resample(x, weight, f, up, down, padding, 1, up == 1, False, upfirdn2d)
    d = demodulation(weight, styles) if demodulate else None
    plain_noise = noise is None or noise.ndim < 3 or noise.shape[-3] == 1
    if plain_noise and act in SLOPE_BELOW_ZERO and gain > 0 and alpha >= 0:
        return _epilogue(x, d, noise, bias, act, alpha, gain, clamp)
    x = x if d is None else x * d.to(x.dtype)[:, :, None, None]
    x = x if noise is None else x + noise.to(x.dtype)
    return bias_act(x, bias, act=act, alpha=alpha, gain=gain, clamp=clamp)


def _triton(
    x, weight, styles, noise, up, down, padding, f, demodulate, bias, act, alpha, gain, clamp
) -> Tensor:
    if not gemm_fits(x, weight, f, up, 1):
        return _library(
            x, weight, styles, noise, up, down, padding, f, demodulate, bias, act, alpha, gain, clamp
        )
    d = demodulation(weight, styles) if demodulate else None
    around = (styles, d, noise, bias, act, alpha, gain, clamp)
    return gemm_resample(x, weight, f, up, down, padding, up == 1, False, *around)


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    shapes, up, down, padding, demodulate, noisy, has_bias, *activation = key
    x, weight, f = class_tensors(dtype, device, shapes, 1, up, down, small)
    n, c_in = x.shape[:2]
    styles = (1 + torch.randn(n, c_in, device=device) / 4).to(dtype).requires_grad_()
    noise = None
    if noisy:
        size = output_size(x, weight, f, up, down, padding)
        noise = torch.randn(n, 1, *size, device=device).to(dtype).requires_grad_()
    bias = torch.randn(weight.shape[0], device=device).to(dtype).requires_grad_() if has_bias else None
    return x, weight, styles, noise, up, down, padding, f, demodulate, bias, *activation


MODULATED_CONV2D = Op(
    "modulated_conv2d", {"triton": _triton, "library": _library, "reference": modulated_conv2d_ref}, _sample
)


def _epilogue_builds() -> list[Build]:
    sizes = dict.fromkeys(("n", "n_channels", "pixels", "noise_n"), "i32")
    tensors = {"p_x": "*bf16", "p_d": "*fp32", "p_noise": "*fp32", "p_b": "*fp32", "p_y": "*bf16"}
    meta = {"ALPHA": 0.2, "GAIN": 2**0.5, "CLAMP": 256.0, "ACT": "lrelu", "GROUP": 8}
    builds = []
    for last in (False, True):
        for block, warps in FLAT_CONFIGS:
            name = f"modulated_conv2d epilogue bf16 {'nhwc' if last else 'nchw'} {block}"
            constants = meta | {"CHANNELS_LAST": last, "BLOCK": block}
            builds.append(
                Build(name, _epilogue_kernel, tensors | sizes, constants, warps, 2, block, 4, ("n",))
            )
    return builds


_NO_STATS = ("p_count", "p_stats")
OFFLINE = [
    *conv_builds("modulated_conv2d", "bf16", _NO_STATS, True),
    *conv_builds("modulated_conv2d up 2", "bf16", _NO_STATS, True, UP=2, KH=6, KW=6),
    *conv_builds("modulated_conv2d", "fp32", _NO_STATS, True),
    *weight_builds("modulated_conv2d weight gradient", "bf16"),
    *weight_builds("modulated_conv2d weight gradient", "fp32"),
    *_epilogue_builds(),
]


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """StyleGAN2's layer: modulate, convolve and resample, demodulate, add noise, then `bias_act`.

    x [N, Cin, H, W]; weight [Cout, Cin, kh, kw], shared by the batch; styles [N, Cin]; noise broadcastable to
    the output, [N, 1, H', W'] or [H', W']; bias [Cout]. Resampling as in `conv2d_resample`.
    With up = 1 the taps correlate, with up > 1 they convolve (a transposed convolution as it is), StyleGAN2's
    convention, so its weights load unchanged.
    Returns [N, Cout, H', W'] in x's dtype; demodulation is computed in fp32.
    Raises ValueError for wrong ranks or channel counts that do not match.
    """
    check_tensors(x, weight=weight, styles=styles, noise=noise, resample_filter=resample_filter, bias=bias)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [Cout, {x.shape[1]}, kh, kw] to match x: got {list(weight.shape)}")
    if styles.shape != (x.shape[0], x.shape[1]):
        raise ValueError(f"styles must be [{x.shape[0]}, {x.shape[1]}] to match x: got {list(styles.shape)}")
    if up < 1 or down < 1:
        raise ValueError(f"up and down must be at least 1: got {up} and {down}")
    if resample_filter is not None and resample_filter.ndim not in (1, 2):
        raise ValueError(f"resample_filter must have 1 or 2 dimensions: got {list(resample_filter.shape)}")
    activation = check_activation(weight.shape[0], bias, act, alpha, gain, clamp)
    pads = parse_padding(padding)
    size = output_size(x, weight, resample_filter, up, down, pads)
    if noise is not None:
        # Tuples, for a size that torch.export leaves open is not hashable.
        allowed = [(1, x.shape[0]), (1, weight.shape[0]), (1, size[0]), (1, size[1])][4 - noise.ndim :]
        if noise.ndim > 4 or any(n not in a for n, a in zip(noise.shape, allowed, strict=True)):
            raise ValueError(
                f"noise must be [{x.shape[0]}, 1, {size[0]}, {size[1]}] or [{size[0]}, {size[1]}]: "
                f"got {list(noise.shape)}"
            )

    def key():
        given = demodulate, noise is not None, bias is not None
        return shape_class(x, weight, resample_filter), up, down, pads, *given, *activation

    args = (weight, styles, noise, up, down, pads, resample_filter, demodulate, bias, *activation)
    return MODULATED_CONV2D(x, *args, key=key, impl=impl)
