"""Convolution with FIR up- or downsampling, in the cheaper order (stylegan2-ada-pytorch's `conv2d_resample`).

    y = downsample(conv(upsample(x)))

A 1x1 convolution runs at the lower resolution; an upsampling one is a strided transposed convolution followed
by the FIR; a downsampling one is the FIR followed by a strided convolution.

The kernel makes one convolution of the upsampling and its FIR: correlating with w and then with f is
correlating with their full convolution, k + taps - 1 wide. In polyphase form (`conv_gemm`) an output pixel
meets only every up-th of its taps, 3x3 for a 3x3 w and a 4x4 f, and no image of the higher resolution lies
between. w and f are combined by `upfirdn2d`, so the gradient reaches w to any order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.kernels.bias_act import ACTIVATIONS, bias_act, bias_act_ref
from fastgan.kernels.conv_gemm import SLOPE_BELOW_ZERO, conv_builds, conv_gemm, convolve, weight_builds
from fastgan.kernels.dispatch import Op, bucket, check_tensors
from fastgan.kernels.memory import is_channels_last
from fastgan.kernels.upfirdn2d import Pair, filter_size, parse_padding, upfirdn2d, upfirdn2d_ref

MAX_TAPS = 10  # a combined filter of more taps a side is left to the library


def _conv2d(
    x: Tensor, w: Tensor, groups: int, flip_weight: bool, stride: int = 1, padding: Pair = 0
) -> Tensor:
    if not flip_weight:  # F.conv2d correlates
        w = w.flip([2, 3])
    pad = padding if isinstance(padding, int) else tuple(padding)
    return F.conv2d(x, w, stride=stride, padding=pad, groups=groups)


def _conv2d_up(x: Tensor, w: Tensor, up: int, pad: tuple[int, int], groups: int, flip_weight: bool) -> Tensor:
    """Zero insertion by `up`, then convolution: a transposed convolution, which flips the taps."""
    if flip_weight:
        w = w.flip([2, 3])
    oc, ic, kh, kw = w.shape
    if groups == 1:
        w = w.transpose(0, 1)
    else:
        w = (
            w.reshape(groups, oc // groups, ic, kh, kw)
            .transpose(1, 2)
            .reshape(groups * ic, oc // groups, kh, kw)
        )
    return F.conv_transpose2d(x, w, stride=up, padding=pad, groups=groups)


def fir_ref(
    x: Tensor,
    f: Tensor | None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """upfirdn2d's reference with the same factor and padding for both axes."""
    return upfirdn2d_ref(x, f, (up, up), (down, down), parse_padding(padding), flip_filter, gain)


def _fir_padding(
    f: Tensor | None, up: int, down: int, padding: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """`padding` plus what the FIR needs to keep the image in place."""
    fw, fh = filter_size(f)
    x0, x1, y0, y1 = padding
    if up > 1:
        x0, x1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2
        y0, y1 = y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2
        y0, y1 = y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    return x0, x1, y0, y1


def output_size(
    x: Tensor, w: Tensor, f: Tensor | None, up: int, down: int, padding: tuple[int, int, int, int]
) -> tuple[int, int]:
    """(H', W') of the resampled convolution. ValueError when nothing is left."""
    fw, fh = filter_size(f)
    x0, x1, y0, y1 = _fir_padding(f, up, down, padding)
    firs = (up > 1) + (down > 1)
    height = (x.shape[2] * up + y0 + y1 - firs * (fh - 1) - w.shape[2]) // down + 1
    width = (x.shape[3] * up + x0 + x1 - firs * (fw - 1) - w.shape[3]) // down + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"padding {list(padding)} leaves x {list(x.shape)} smaller than a kernel of {list(w.shape[2:])}"
        )
    return height, width


def library_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    groups: int,
    flip_weight: bool,
    flip_filter: bool,
    upfirdn2d: Callable[..., Tensor],
) -> Tensor:
    """The library's convolutions around `upfirdn2d`, a kernel or the reference."""
    w = w.to(x.dtype)
    kh, kw = w.shape[2:]
    x0, x1, y0, y1 = _fir_padding(f, up, down, padding)
    pad = (x0, x1, y0, y1)
    pointwise = kh == 1 and kw == 1

    if pointwise and down > 1 and up == 1:
        x = upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter)
        return _conv2d(x, w, groups, flip_weight)
    if pointwise and up > 1 and down == 1:
        x = _conv2d(x, w, groups, flip_weight)
        return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=up**2)
    if down > 1 and up == 1:
        x = upfirdn2d(x, f, padding=pad, flip_filter=flip_filter)
        return _conv2d(x, w, groups, flip_weight, stride=down)
    if up > 1:
        # What of the padding the transposed convolution can crop, it crops; the FIR pads the rest.
        x0, x1, y0, y1 = x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up)
        px, py = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
        x = _conv2d_up(x, w, up, (py, px), groups, flip_weight)
        pad = (x0 + px, x1 + px, y0 + py, y1 + py)
        x = upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=up**2)
        return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return _conv2d(x, w, groups, flip_weight, padding=(y0, x0))
    return _conv2d(F.pad(x, [x0, x1, y0, y1]), w, groups, flip_weight)


def combined_filter(
    w: Tensor, f: Tensor | None, up: int, flip_weight: bool, flip_filter: bool, dtype: torch.dtype
) -> Tensor:
    """The full convolution of w [Cout, Cin, kh, kw] and up^2 f as a correlation's taps: taps + k - 1 wide."""
    fw, fh = filter_size(f)
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    w = w if flip_weight else w.flip([2, 3])
    pad = (fw - 1, fw - 1, fh - 1, fh - 1)
    return upfirdn2d(w, f, padding=pad, flip_filter=not flip_filter, gain=up**2).to(dtype)


def gemm_fits(x: Tensor, w: Tensor, f: Tensor | None, up: int, groups: int) -> bool:
    """Whether the implicit-GEMM kernel takes this convolution."""
    taps = max(w.shape[2:]) + (max(filter_size(f)) - 1 if up > 1 else 0)
    return groups == 1 and taps <= MAX_TAPS and not (x.is_cuda and x.dtype == torch.float64)


def gemm_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    flip_weight: bool,
    flip_filter: bool,
    s_in: Tensor | None,
    s_out: Tensor | None,
    noise: Tensor | None,
    bias: Tensor | None,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """act(s_out * conv2d_resample(s_in * x) + noise + bias) with `conv_gemm`, in its epilogue what can be."""
    kh, kw = w.shape[2:]
    x0, x1, y0, y1 = _fir_padding(f, up, down, padding)
    pad, stride = (x0, x1, y0, y1), 1
    taps_x, taps_y = kw, kh
    last_fir: dict[str, Any] | None = None
    polyphase = up > 1 and not (kh == kw == 1 and down == 1)
    if polyphase:
        w = combined_filter(w, f, up, flip_weight, flip_filter, x.dtype)
        taps_y, taps_x = w.shape[2:]
        flip_weight = True
        last_fir = {"down": down} if down > 1 else None
    elif up > 1:
        last_fir, pad = {"up": up, "padding": pad, "gain": up**2}, (0, 0, 0, 0)
    elif down > 1:
        pointwise = kh == kw == 1
        x = upfirdn2d(x, f, down=down if pointwise else 1, padding=pad, flip_filter=flip_filter)
        pad, stride = (0, 0, 0, 0), 1 if pointwise else down
    rate = up if polyphase else 1
    out_h = (x.shape[2] * rate + pad[2] + pad[3] - taps_y) // stride + 1
    out_w = (x.shape[3] * rate + pad[0] + pad[1] - taps_x) // stride + 1
    geometry = (rate, stride, pad[2], pad[0], out_h, out_w)
    w = w.to(x.dtype)
    in_epilogue = last_fir is None and (noise is None or noise.ndim < 3 or noise.shape[-3] == 1)
    if in_epilogue and act in SLOPE_BELOW_ZERO and gain > 0 and alpha >= 0:
        return conv_gemm(x, w, s_in, s_out, noise, bias, geometry, not flip_weight, act, alpha, gain, clamp)
    x = convolve(x, w, s_in, s_out, geometry, not flip_weight)
    if last_fir is not None:
        x = upfirdn2d(x, f, flip_filter=flip_filter, **last_fir)
    if noise is not None:
        x = x + noise.to(x.dtype)
    return bias_act(x, bias, act=act, alpha=alpha, gain=gain, clamp=clamp)


def _triton(
    x, w, f, up, down, padding, groups, flip_weight, flip_filter, bias, act, alpha, gain, clamp
) -> Tensor:
    if not gemm_fits(x, w, f, up, groups):
        return _library(
            x, w, f, up, down, padding, groups, flip_weight, flip_filter, bias, act, alpha, gain, clamp
        )
    resampling = (up, down, padding, flip_weight, flip_filter)
    return gemm_resample(x, w, f, *resampling, None, None, None, bias, act, alpha, gain, clamp)


def _library(
    x, w, f, up, down, padding, groups, flip_weight, flip_filter, bias, act, alpha, gain, clamp
) -> Tensor:
    x = library_resample(x, w, f, up, down, padding, groups, flip_weight, flip_filter, upfirdn2d)
    return bias_act(x, bias, act=act, alpha=alpha, gain=gain, clamp=clamp)


def conv2d_resample_ref(
    x, w, f, up, down, padding, groups, flip_weight, flip_filter, bias, act, alpha, gain, clamp
) -> Tensor:
    """The reference of `conv2d_resample`."""
    x = library_resample(x, w, f, up, down, padding, groups, flip_weight, flip_filter, fir_ref)
    return bias_act_ref(x, bias, 1, act, alpha, gain, clamp)


def shape_class(x: Tensor, w: Tensor, f: Tensor | None) -> tuple:
    """What of the shapes decides which convolution is fastest."""
    taps = None if f is None else tuple(f.shape)
    return bucket(x.numel() // max(x.shape[1], 1)), is_channels_last(x), tuple(w.shape), taps


def class_tensors(
    dtype: torch.dtype, device: torch.device, shapes: tuple, groups: int, up: int, down: int, small: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random x, w and f of a `shape_class`, with few pixels and channels when `small`."""
    size, channels_last, (c_out, c_in, kh, kw), taps = shapes
    if small:
        c_out, c_in, size = groups * min(c_out // groups, 12), min(c_in, 20), 10
    side = max(2 ** min((size - 1) // 2, 9), 2 * down)
    batch = 2 if small else max(2 ** (size - 1) // side**2, 1)
    x = torch.randn(batch, c_in * groups, side, side, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    w = (torch.randn(c_out, c_in, kh, kw, device=device) / (c_in * kh * kw) ** 0.5).to(dtype)
    f = None if taps is None else torch.rand(taps, device=device) + 0.1
    f = f if f is None or not f.numel() else f / f.sum()
    return x.requires_grad_(), w.requires_grad_(), f


def _sample(dtype: torch.dtype, device: torch.device, key: Any, small: bool) -> tuple:
    shapes, groups, up, down, padding, flips, has_bias, *activation = key
    x, w, f = class_tensors(dtype, device, shapes, groups, up, down, small)
    bias = torch.randn(w.shape[0], device=device).to(dtype).requires_grad_() if has_bias else None
    return x, w, f, up, down, padding, groups, *flips, bias, *activation


CONV2D_RESAMPLE = Op(
    "conv2d_resample", {"triton": _triton, "library": _library, "reference": conv2d_resample_ref}, _sample
)
_NO_SCALES = ("p_s_in", "p_s_out", "p_noise", "p_count", "p_stats")
OFFLINE = [
    *conv_builds("conv2d_resample", "bf16", _NO_SCALES, True),
    *conv_builds(
        "conv2d_resample data gradient of a small image",
        "bf16",
        (*_NO_SCALES, "p_bias"),
        False,
        PER_IMAGE=False,
    ),
    *conv_builds("conv2d_resample", "fp32", _NO_SCALES, True),
    *weight_builds("conv2d_resample weight gradient", "bf16", ("p_s_x", "p_s_g")),
]


def check_activation(
    channels: int, bias: Tensor | None, act: str, alpha: float | None, gain: float | None, clamp: float | None
) -> tuple[str, float, float, float | None]:
    """(act, alpha, gain, clamp) with `bias_act`'s defaults and its complaints."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}: got {act!r}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape [{channels}]: got {list(bias.shape)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must be None or at least 0: got {clamp}")
    default = ACTIVATIONS[act]
    return (
        act,
        default.alpha if alpha is None else float(alpha),
        default.gain if gain is None else float(gain),
        clamp,
    )


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
    *,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Convolution of x [N, Cin, H, W] with w [Cout, Cin / groups, kh, kw], resampled by the FIR `f`.

    `padding` (int, (x, y) or (x0, x1, y0, y1)) is that of the upsampled image; the FIR's comes on top.
    `flip_weight` True correlates as F.conv2d does, False convolves. Returns [N, Cout, H * up / down, ...] for
    padding k // 2, in x's dtype (w is cast). `bias` [Cout] to `clamp`: a `bias_act` behind the convolution,
    fused where it can be. Raises ValueError for wrong ranks, channels or factors.
    """
    check_tensors(x, w=w, f=f, bias=bias)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]: got shape {list(x.shape)}")
    if w.ndim != 4 or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
        raise ValueError(
            f"w must be [Cout, {x.shape[1]} / groups, kh, kw] with groups {groups} dividing Cout: "
            f"got {list(w.shape)}"
        )
    if f is not None and f.ndim not in (1, 2):
        raise ValueError(f"f must have one or two dimensions: got shape {list(f.shape)}")
    if up < 1 or down < 1:
        raise ValueError(f"up and down must be at least 1: got {up} and {down}")
    activation = check_activation(w.shape[0], bias, act, alpha, gain, clamp)
    pads = parse_padding(padding)
    output_size(x, w, f, up, down, pads)

    def key():
        flips = flip_weight, flip_filter
        return shape_class(x, w, f), groups, up, down, pads, flips, bias is not None, *activation

    args = (w, f, up, down, pads, groups, flip_weight, flip_filter, bias, *activation)
    return CONV2D_RESAMPLE(x, *args, key=key, impl=impl)
